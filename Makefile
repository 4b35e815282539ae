# make demo   set up .venv, run every stage on the generated miniature
# make test   set up .venv, run the tests
# make check  lint, types and import contracts
# make browser  the report's page in headless Chromium (needs node, npm and Chromium)
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help setup demo test check browser clean

help:
	@sed -n 's/^# make/make/p' Makefile

setup: $(READY)

# Done again only when what is to be installed has changed.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "mmcli needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,dev]'
	@mkdir -p .mypy && ln -sfn .. .mypy/mmcli
	@touch $@

demo: setup
	$(BIN)/mmcli demo

# One thread a process, because the processes share the cores.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

browser: setup
	npm install --prefix tests/browser --no-audit --no-fund --no-package-lock
	$(BIN)/python -m pytest -q tests/report/test_browser.py

clean:
	rm -rf .venv .mypy demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
