# `make` lists the targets. Needs python3 (3.11 or newer, with venv) and make, nothing else.
PYTHON ?= python3
PROFILE ?= quick
SCENARIO ?=
DATA ?=
TORCH_INDEX ?=
PORT ?= 8866
MINUTES ?= 5
CHROMIUM ?= chromium
# Threads that are done sleep instead of spinning (effad_core/acceleration/threads.py): in kernels and tests too.
OMP_WAIT_POLICY ?= PASSIVE
export OMP_WAIT_POLICY
# Recipes read these as shell variables, so that a path may hold spaces and quotes.
export PROFILE SCENARIO DATA TORCH_INDEX PORT MINUTES CHROMIUM

BIN := .venv/bin/python
PIP := -m pip install --disable-pip-version-check
# What the notebooks and the tests need; `pip install .` alone is enough to train and to predict.
EXTRAS := .[cluster,course,distill,export,serve,test]
# JupyterLab's kernel is this environment's, whatever else is installed on the machine.
export JUPYTER_PATH := $(CURDIR)/.venv/share/jupyter

.PHONY: help tutorial test test-oldest lab app site soak test-browser mutations tidy evidence constraints clean python chromium

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

tutorial: .venv/.installed ## Execute the notebooks [PROFILE=quick|laptop|paper] [SCENARIO=name] [DATA=folder]
	@$(BIN) notebooks/run.py --profile "$$PROFILE" \
		$${SCENARIO:+--scenario "$$SCENARIO"} $${DATA:+--data "$$DATA"}

test: .venv/.installed ## Lint, unit tests, and the notebooks' checked outputs
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	OMP_NUM_THREADS=1 $(BIN) -m pytest -n 2 --dist loadfile
	$(BIN) notebooks/smoke.py build/smoke
	OMP_NUM_THREADS=1 $(BIN) -m pytest -n 2 --dist loadfile -W default --nbval-lax --nbval-current-env build/smoke/notebooks

test-oldest: .venv/.installed ## Run the unit tests on the oldest versions that pyproject.toml admits
	rm -rf build/oldest
	mkdir -p build
	$(BIN) tests/oldest.py > build/oldest.txt
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/python $(PIP) --constraint build/oldest.txt setuptools
	build/oldest/bin/python $(PIP) --constraint build/oldest.txt --no-build-isolation --editable '$(EXTRAS)'
	OMP_NUM_THREADS=1 build/oldest/bin/python -m pytest -n 2 --dist loadfile -W default # newer packages warn of old ones

lab: .venv/.installed ## Open the notebooks in JupyterLab
	$(BIN) -m jupyterlab --LabApp.default_url=/lab/tree/notebooks

app: .venv/.extras ## Serve the threshold explorer as a page [PROFILE=...] [SCENARIO=...] [DATA=...] [PORT=8866]
	@$(BIN) notebooks/app.py --profile "$$PROFILE" --port "$$PORT" \
		$${SCENARIO:+--scenario "$$SCENARIO"} $${DATA:+--data "$$DATA"}

site: .venv/.extras ## Build the executed notebooks and the docstrings as a searchable site
	@$(BIN) docs/build.py

soak: .venv/.installed ## Interrupt runs, damage files and images, run the course on odd folders, at random [MINUTES=5 each]
	$(BIN) tests/soak/interruption.py --minutes "$$MINUTES"
	$(BIN) tests/soak/files.py --minutes "$$MINUTES"
	$(BIN) tests/soak/images.py --minutes "$$MINUTES"
	$(BIN) tests/soak/folders.py --minutes "$$MINUTES"
	$(BIN) tests/soak/cluster.py

mutations: .venv/.installed ## Break the code in one way at a time and see which test notices
	$(BIN) tests/mutations/run.py

test-browser: chromium .venv/.extras ## Drive the explorer and the site in Chromium
	$(BIN) -m pytest -rP tests/browser

tidy: .venv/.installed ## Execute the notebooks with the profile smoke and strip them for a commit
	$(BIN) notebooks/tidy.py --run

evidence: .venv/.installed ## Train what the notebooks show as evidence, if it is missing or out of date (hours)
	$(BIN) -m benchmarks.evidence

constraints: python ## Refresh constraints.txt with the newest admitted versions [HOLD=package==1.2]
	rm -rf build/constraints
	$(PYTHON) -m venv build/constraints
	build/constraints/bin/python $(PIP) --upgrade setuptools
	build/constraints/bin/python $(PIP) --no-build-isolation --editable '.[cluster,course,distill,export,serve,test,site,browser]' $(HOLD)
	grep '^#' constraints.txt > build/constraints.txt
	build/constraints/bin/python -m pip freeze --all --exclude pip --exclude-editable >> build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/constraints

clean: ## Remove build/ (executed notebooks and their runs) and caches
	rm -rf build .pytest_cache .ruff_cache .hypothesis

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "This needs Python 3.11 or newer as '$(PYTHON)'; name another with PYTHON=python3.12." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
		echo "This needs Python's venv; on Debian and Ubuntu it is the package python3-venv." >&2; exit 1; }

chromium:
	@command -v "$$CHROMIUM" > /dev/null || { \
		echo "This needs Chromium as '$(CHROMIUM)' (apt-get install chromium); name another with CHROMIUM=google-chrome." >&2; \
		exit 1; }

# The stamp is written last: an interrupted installation is taken up again by the next call.
.venv/.installed: pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory python
	$(PYTHON) -m venv .venv
	$(BIN) $(PIP) --constraint constraints.txt setuptools
	@if [ -n "$$TORCH_INDEX" ]; then set -x; \
		$(BIN) $(PIP) --constraint constraints.txt --no-deps --index-url "$$TORCH_INDEX" torch torchvision; fi
	$(BIN) $(PIP) --constraint constraints.txt --no-build-isolation --editable '$(EXTRAS)'
	@touch $@

.venv/.extras: .venv/.installed
	$(BIN) $(PIP) --constraint constraints.txt --no-build-isolation --editable '.[site,browser]'
	@touch $@
