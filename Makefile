# make report   train on this machine, build the site, say where it is
# make test     everything that has to hold
# make help     the other targets

SHELL := /bin/bash
BIN := .venv/bin
INSTALLED := .venv/.installed
START := $(shell date +%s)

# An interpreter may be named: make test PYTHON=/opt/python3.12/bin/python3
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3.12 python3.11 python3)
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))

BUILD := OMP_NUM_THREADS=1 $(BIN)/jupyter-book build book -W -n --keep-going --all

.PHONY: help report test venv export nbtest book sweep gpu clean

help:
	@echo "make report   install, train rotation and multi, build the site (two cores: within 20 minutes)"
	@echo "make test     export drift, every notebook, pytest, the book with warnings as errors, the site in a browser"
	@echo "make venv     install into .venv                make export   notebooks -> seqjepa_nb/"
	@echo "make nbtest   run the notebooks as tests        make book     build the site into book/_build/html"
	@echo "make sweep    do what is missing of SWEEP=sweeps/reproduction.yml, JOBS=1 at a time; make sweep DRY=--dry-run only says what"
	@echo "make gpu      measure and train everything that needs a GPU, within BUDGET=600 seconds or without a limit"
	@echo "make clean    remove what was built (runs/ and data/ stay)"

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@python=; for p in $(CANDIDATES); do \
	    if command -v $$p >/dev/null && $$p -c '$(FITS)' 2>/dev/null; then python=$$p; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "seqjepa_nb needs Python 3.11 or 3.12; none of these is one: $(CANDIDATES)." >&2; \
	    echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	echo "Installing into .venv with $$python ($$($$python -V 2>&1)): some 3 GB to download on a first time."; \
	$$python -m venv .venv || { echo "No virtual environment could be made. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev]'
	@touch $@

report: $(INSTALLED)
	@$(BIN)/python book/report.py $(START)

# Two tests at a time; those that look at the built site stay together (see xdist_group in tests/), so that it is built once.
test: nbtest
	$(BIN)/pytest -n 2 --dist loadgroup --durations 10

# Each notebook in a process of its own, two at a time, one thread each. Those that begin with 2 are whole runs: pytest starts small ones.
nbtest: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --skip_file_re '^[_.2]'

export: $(INSTALLED)
	$(BIN)/nbdev_export

book: $(INSTALLED)
	$(BUILD)

SWEEP ?= sweeps/reproduction.yml
JOBS ?= 1
sweep: $(INSTALLED)
	$(BIN)/python -m seqjepa_nb.sweep $(SWEEP) --jobs $(JOBS) $(DRY)

gpu: $(INSTALLED)
	$(BIN)/python book/gpu.py $(if $(BUDGET),--budget $(BUDGET))

clean:
	rm -rf book/_build seqjepa_nb.egg-info .pytest_cache _proc build dist
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
