"""The declared requirements: bounded, met by this environment, and able to do what they are there for."""
import configparser
import importlib.metadata
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

settings = configparser.ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini")
DECLARED = {name: [Requirement(line) for line in shlex.split(value)] for name, value in settings["DEFAULT"].items()
            if name in ("requirements", "dev_requirements") or name.startswith("extra_")}


@pytest.mark.parametrize("group", DECLARED)
def test_requirements_are_bounded(group):
    for requirement in DECLARED[group]:
        operators = {specifier.operator for specifier in requirement.specifier}
        assert ">=" in operators and "<" in operators, requirement


@pytest.mark.parametrize("group", ["requirements", "dev_requirements"])
def test_this_environment_meets_the_bounds(group):
    for requirement in DECLARED[group]:
        version = importlib.metadata.version(requirement.name)
        assert requirement.specifier.contains(version), f"{requirement} but {version} is installed"


def test_nothing_is_broken():
    checked = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_resolved_set_imports_and_trains():
    """`pip check` can be content with a set that fails at import: so nbdev is imported, and fastai trains."""
    code = """
import nbdev.export, nbdev.clean, nbdev.process, torch, torchvision
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
torch.manual_seed(0)
x = torch.randn(64, 4); items = list(zip(x, x.sum(dim=1, keepdim=True)))
learn = Learner(DataLoaders(DataLoader(items, bs=16), DataLoader(items, bs=64)), torch.nn.Linear(4, 1), loss_func=torch.nn.functional.mse_loss)
with learn.no_bar(), learn.no_logging():
    before = learn.validate()[0]; learn.fit(5, 1e-1); after = learn.validate()[0]
assert after < before / 2, (before, after)
torchvision.ops.nms(torch.tensor([[0., 0., 1., 1.]]), torch.tensor([1.]), 0.5)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
