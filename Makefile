# fmnb: `make demo` for a first result, `make test` for all tests. Each sets up .venv when need be.
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
README := README.md
# The first of these that is Python 3.11 or 3.12.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)

.PHONY: help install demo test bench lab export notebooks readme docs clean

help:  ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /\1\t/' | expand -t 12

install: $(INSTALLED)  ## create .venv and install fmnb with what its developers need

$(INSTALLED): settings.ini setup.py
	@test -n "$(PYTHON)" || { echo "fmnb needs Python 3.11 or 3.12; install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e ".[dev,hub,lora,tune,explain,diff,track]"
	@touch $@

demo: $(INSTALLED)  ## train and compare a CNN, an RNN and a Transformer on handwritten digits
	$(BIN)/fmnb run compare --out runs/demo --overwrite

test: $(INSTALLED)  ## notebooks in sync, clean and executed; contracts, workflows, reports
	$(BIN)/python -m pytest -n auto --dist worksteal

bench: $(VENV)/.bench  ## fmnb and its peers in turn; keep the machine free meanwhile
	for notebook in nbs/benchmarks/*.ipynb; do $(BIN)/fmnb run "$$notebook" --out "runs/bench/$$(basename "$$notebook" .ipynb)" --overwrite || exit 1; done

$(VENV)/.bench: $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e ".[bench]"
	@touch $@

lab: $(INSTALLED)  ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=nbs

export: $(INSTALLED)  ## write fmnb/ from the notebooks, and clean them
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

notebooks: $(INSTALLED)  ## execute all notebooks but reports and benchmarks in place, so that their outputs are evidence
	for notebook in nbs/*.ipynb nbs/guides/*.ipynb; do $(BIN)/jupyter execute --inplace "$$notebook" || exit 1; done
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

readme: $(INSTALLED)  ## write README.md from nbs/index.ipynb
	$(BIN)/jupyter nbconvert --log-level WARN --to markdown --stdout --RegexRemovePreprocessor.patterns='["#\\|\\s*hide"]' nbs/index.ipynb > $(README).part || { rm -f $(README).part; exit 1; }
	sed 's#](images/#](nbs/images/#g' $(README).part \
		| awk '/^```./ { inside = 1 } /^```$$/ { if (inside = !inside) { print "```python"; next } } { print }' > $(README)
	rm $(README).part

docs: $(VENV)/.docs  ## the site, from the notebooks as they stand: _docs/index.html
	$(BIN)/python docs/build.py

$(VENV)/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e ".[docs]"
	@touch $@

clean:  ## remove what can be made again, except for runs/
	rm -rf $(VENV) build dist *.egg-info _proc _docs .pytest_cache
	find . -path ./runs -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
