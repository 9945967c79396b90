"""`make docs`: notebooks -> nbdev (`_proc/`) -> pages -> Sphinx -> checked -> `_docs/`."""
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_DOCUMENTED = r"^[_.]|^runs$|^models$"  # folders that notebooks leave behind


def main() -> int:
    "Build the site; 0 if nothing is wrong with it."
    from api import read_modules
    from check import check_site
    from mend import valid_html
    from nbdev.config import get_config
    from nbdev.serve import proc_nbs
    from pages import write_pages
    from sphinx.cmd.build import build_main

    os.chdir(ROOT)
    settings, work = get_config(), ROOT / "build" / "docs"
    processed = proc_nbs(force=True, skip_folder_re=NOT_DOCUMENTED)
    shutil.rmtree(work, ignore_errors=True)
    modules = read_modules(ROOT, settings.lib_name)
    write_pages(settings.nbs_path, processed, work / "pages", modules, settings.lib_name,
                f"{settings.doc_host}{settings.doc_baseurl}/", f"{settings.git_url}/blob/{settings.branch}/{settings.nbs_path.name}")
    if build_main(["-W", "--keep-going", "-q", "-c", str(ROOT / "docs"), "-d", str(work / "doctrees"), str(work / "pages"), str(work / "html")]):
        return 1
    for page in (work / "html").rglob("*.html"):
        page.write_text(valid_html(page.read_text(encoding="utf-8")), encoding="utf-8")
    if problems := check_site(work / "html"):
        print("\n".join(problems), file=sys.stderr)
        return 1
    shutil.rmtree(settings.doc_path, ignore_errors=True)
    (work / "html").rename(settings.doc_path)
    print(f"The site is in {settings.doc_path.name}/: open {settings.doc_path.name}/index.html.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
