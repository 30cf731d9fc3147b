# Every target sets up the environment first, once. `make help` lists them.
VENV   := .venv
BIN    := $(abspath $(VENV))/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
UV     ?= $(BIN)/uv
CORES  := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
JOBS   ?= $(shell [ $(CORES) -gt 4 ] && echo 4 || echo $(CORES))
RUN    ?= runs/compare
F      ?= nbs/experiments/params/compare_small.yaml
P      ?=
T      ?=
export PATH := $(BIN):$(PATH)

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 20

run: $(VENV)/.ok ## train with and without FlowLoss on robot clips and compare (other parameters: make run P='-p seeds=[1]')
	python -m flowloss_nb.runs experiments/train/compare $(RUN) --overwrite -f $(F) $(P)

test: $(VENV)/.ok ## run every notebook and every test (some of them: make test T='-k edm')
	OMP_NUM_THREADS=1 pytest -q -n $(JOBS) --dist worksteal --durations 10 tests $(T)

lab: $(VENV)/.ok ## open the notebooks in JupyterLab
	jupyter lab --notebook-dir nbs

export: $(VENV)/.ok ## write flowloss_nb/ and README.md from the notebooks, and clean them
	nbdev_export && nbdev_clean && python tests/pages.py readme

docs: $(VENV)/.ok ## build the site with Quarto into _docs/
	@command -v quarto >/dev/null || { echo 'make docs needs Quarto: https://quarto.org/docs/get-started (make docs-preview does without)'; exit 1; }
	python tests/pages.py process && cd _proc && quarto render --no-cache && rm -rf ../_docs && mv _docs ..

docs-preview: $(VENV)/.ok ## build the same pages without Quarto into _docs/, and check every link
	python tests/pages.py site

# The environment. uv reads no pip configuration, so pip's indexes and wheel folders are passed to it; pip itself is the fallback.
setting = $$(printenv PIP_$(1) || $(BIN)/python -m pip config get global.$(2) 2>/dev/null || true)
$(VENV)/.ok: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
	  echo "This project needs Python 3.11, and '$(PYTHON)' is not it: install python3.11, or give its path: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Setting up $(VENV): once, about a minute"
	@$(PYTHON) -m venv $(VENV) || { echo "python -m venv failed: on Debian and Ubuntu, apt-get install python3.11-venv"; exit 1; }
	@$(BIN)/python -m pip install -q uv==0.13.8 || echo "uv could not be installed: using pip, which takes about five minutes"
	@index="$(call setting,INDEX_URL,index-url)"; extra="$(call setting,EXTRA_INDEX_URL,extra-index-url)"; \
	links="$(call setting,FIND_LINKS,find-links)"; \
	if [ -n "$$index" ]; then export UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$$index}"; fi; \
	if [ -n "$$extra" ]; then export UV_EXTRA_INDEX_URL="$${UV_EXTRA_INDEX_URL:-$$extra}" UV_INDEX_STRATEGY="$${UV_INDEX_STRATEGY:-unsafe-best-match}"; fi; \
	if [ -n "$$links" ]; then export UV_FIND_LINKS="$${UV_FIND_LINKS:-$$(echo $$links | tr ' ' ',')}"; fi; \
	{ $(UV) pip install -q --python $(BIN)/python -r requirements.txt && \
	  $(UV) pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e . ; } || \
	{ echo "uv failed: trying pip, which takes about five minutes"; \
	  $(BIN)/python -m pip install -q -r requirements.txt && \
	  $(BIN)/python -m pip install -q --no-deps --no-build-isolation -e . ; }
	@touch $@

.PHONY: help run test lab export docs docs-preview
