# make help shows what there is. Every target makes the environment it needs.
PYTHON  ?= python3
VENV    ?= .venv
PROFILE ?= quick
LESSONS ?= --all

ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
PY    := $(BIN)/python
STAMP := $(VENV)/.medtut-ready

.DEFAULT_GOAL := help
.PHONY: help env course smoke test lint lab notebooks slides bench clean

help: ## show this help
	@$(PYTHON) -c "import re; [print(f'  make {m[1]:<10} {m[2]}') for m in re.finditer(r'^([a-z]+):[^#\n]*## (.+)', open('Makefile', encoding='utf-8').read(), re.M)]"
	@echo "  variables: PROFILE=smoke|quick|full  LESSONS='01 02'  PYTHON=python3.12"

env: $(STAMP) ## make the environment in .venv (the exact tried versions)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('medtut needs Python 3.11 or newer; this is ' + sys.version.split()[0] + '. Try: make env PYTHON=python3.12') if sys.version_info < (3, 11) else None"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -c constraints.txt -e ".[lab,test]"
	$(PY) -c "import pathlib; pathlib.Path('$(STAMP)').touch()"

course: env ## run the lessons headlessly; pages in build/<profile>/index.html
	$(PY) -m medtut run $(LESSONS) --profile $(PROFILE)

smoke: env ## the same in seconds, to see that everything works (not evidence)
	$(PY) -m medtut run $(LESSONS) --profile smoke

test: env ## style, unit tests, notebook tests
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest tests
	MEDTUT_PROFILE=smoke $(PY) -m pytest --nbval-lax --nbval-current-env notebooks -p no:cacheprovider

lint: env ## style only, with repairs
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

lab: env ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

notebooks: env ## rebuild the stored notebooks from notebooks/source (runs them)
	$(PY) -m tools.notebooks build --execute

slides: env ## build the decks (needs marp-cli and Chromium, see CONTRIBUTING.md)
	$(PY) -m tools.slides
	marp --config-file slides/marp.config.json
	marp --config-file slides/marp.config.json --pdf

bench: env ## measure the LoRA engine on this machine
	$(PY) -m medtut bench lora

clean: ## remove what was built (not the environment, not the data cache)
	$(PYTHON) -c "import shutil; [shutil.rmtree(p, ignore_errors=True) for p in ('build', '.pytest_cache', '.ruff_cache', '.hypothesis')]"
