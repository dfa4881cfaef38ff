# make smoke   ReST on the parallel text in the repository: a table, a report, about seven minutes after the installation
# make test    the tests that a change should pass before it is shown
# make test_slow  the others: runs that are killed and resumed, four processes, ten thousand pairs, the TPU's compiler
# make lint    formatting, lint, types
# Each makes .venv first (Python 3.11 or newer and a network are all it needs); a second run uses it again.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: test_slow smoke test lint install clean

# The first interpreter that is new enough; `make PYTHON=...` names another.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3; do \
	if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "$$python"; break; fi; done)
MODEL_DIR ?= $(CURDIR)/runs_output/smoke
# At most 8 test processes: each holds a JAX of its own in memory.
TEST_PROCESSES ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$(( n < 8 ? n : 8 )))

VENV := .venv
# Named by content and folder: times in a fresh clone mean nothing, and an editable install holds this folder's path.
INSTALLED := $(VENV)/.installed-$(shell { pwd; cat setup.py constraints.txt; } | cksum | tr ' ' '-')

install: $(INSTALLED)

$(INSTALLED):
	@if [ -z "$(PYTHON)" ]; then \
		echo "No Python 3.11 or newer was found. On Debian or Ubuntu: sudo apt-get install python3 python3-venv; or make PYTHON=/path/to/python3.11" >&2; \
		exit 2; fi
	@if ! "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "$(PYTHON) cannot make virtual environments. On Debian or Ubuntu: sudo apt-get install $$(basename $(PYTHON))-venv" >&2; \
		exit 2; fi
	if ! $(VENV)/bin/python -c pass 2>/dev/null; then "$(PYTHON)" -m venv --clear $(VENV); fi
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[seqio,test]'
	rm -f $(VENV)/.installed-*
	touch $@

# gin reads the value as a Python literal, hence the quotes inside.
smoke: $(INSTALLED)
	$(VENV)/bin/python -m rest_jax run --gin_file=runs/smoke.gin --gin.MODEL_DIR="'$(MODEL_DIR)'"

# Whole files go to one process, so that a file's compiled programs and fixtures are made once.
test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

# The TPU's compiler lies beside the environment, not in it: where JAX finds it without a TPU, each start prints warnings.
# It is there for Linux on x86_64 alone; elsewhere its tests are skipped.
TPU_COMPILER := $(VENV)/tpu-compiler

$(TPU_COMPILER)/.installed: $(INSTALLED)
	rm -rf $(TPU_COMPILER)
	if [ "$$(uname -sm)" = "Linux x86_64" ]; then \
		$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt \
			--target $(TPU_COMPILER) libtpu; fi
	mkdir -p $(@D) && touch $@

test_slow: $(INSTALLED) $(TPU_COMPILER)/.installed
	PYTHONPATH=$(CURDIR)/$(TPU_COMPILER) $(VENV)/bin/python -m pytest -m slow -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
