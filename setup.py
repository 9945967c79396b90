"""Packaging for fmnb: every value comes from settings.ini, which nbdev reads as well."""
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

settings = ConfigParser(delimiters=["="])
settings.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]

licenses = {"apache2": "Apache-2.0"}
statuses = {"3": "Development Status :: 3 - Alpha", "4": "Development Status :: 4 - Beta", "5": "Development Status :: 5 - Production/Stable"}
extras = {name.removeprefix("extra_"): shlex.split(value) for name, value in cfg.items() if name.startswith("extra_")}
extras["all"] = sorted({requirement for group in extras.values() for requirement in group})
extras["dev"] = shlex.split(cfg["dev_requirements"])

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    license=licenses[cfg["license"]],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    classifiers=[
        statuses[cfg["status"]],
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Framework :: Jupyter",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
    ],
    python_requires=f">={cfg['min_python']}",
    install_requires=shlex.split(cfg["requirements"]),
    extras_require=extras,
    # The report templates stand in nbs/ and travel in the package.
    packages=[*find_packages(include=["fmnb", "fmnb.*"]), "fmnb.reports"],
    package_dir={"fmnb.reports": "nbs/reports"},
    package_data={"fmnb.reports": ["*.ipynb"]},
    entry_points={
        "console_scripts": shlex.split(cfg["console_scripts"]),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
        "papermill.engine": ["fmnb = fmnb.run.engine:ReportEngine"],
    },
    zip_safe=False,
)
