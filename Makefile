# make demo and make test need Python >= 3.10 and, for the compiled kernels, a C++ compiler; they make the rest.
# Set on the command line: PYTHON (python3), VENV (.venv), CONSTRAINTS (constraints.txt, empty for none),
# DEMO and TESTS (further arguments for the demo and for pytest).

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BUILD := setup.py pyproject.toml ctorch/_version.py $(wildcard build_support/*.py csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
INSTALL = $(PIP) --no-build-isolation
HAS_VERSION = import sys; sys.exit(sys.version_info < (3, 10) and f"ctorch needs Python >= 3.10; \
this is {sys.version.split()[0]}. Say which to use: make PYTHON=python3.12")

.PHONY: help demo test cuda peer-tests docs clean

help:
	@echo "make demo                    set up $(VENV), then run the demo"
	@echo "make test                    set up $(VENV), then run the whole test suite"
	@echo "make cuda                    build the CUDA kernels too (needs nvcc)"
	@echo "make peer-tests SUITE=DIR    run a copy of torchdiffeq's tests against ctorch"
	@echo "make docs                    build the documentation"
	@echo "make clean                   remove what was built; $(VENV) stays"

demo: $(VENV)/.ctorch-demo
	$(VENV)/bin/ctorch demo $(DEMO)

test: $(VENV)/.ctorch-dev
	$(VENV)/bin/python -m pytest $(TESTS)

cuda: $(VENV)/.torch
	@echo "==> building ctorch with its CUDA kernels"
	CTORCH_EXT=1 CTORCH_CUDA=1 $(INSTALL) -e ".[demo]"
	@touch $(VENV)/.ctorch-demo
	$(VENV)/bin/ctorch info

peer-tests: $(VENV)/.ctorch-dev
	@test -d "$(SUITE)" || { echo "SUITE must be a folder with torchdiffeq's tests: make peer-tests SUITE=DIR"; exit 2; }
	PYTHONPATH=tests/peer $(VENV)/bin/python -m pytest -p torchdiffeq_alias -c tests/peer/pytest.ini \
	    --rootdir "$(SUITE)" "$(SUITE)" $(TESTS)

docs: $(VENV)/.ctorch-dev
	$(VENV)/bin/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	$(VENV)/bin/python -m sphinx -W --keep-going -q -b doctest docs docs/_build/doctest
	@echo "docs/_build/html/index.html"

clean:
	rm -rf build dist docs/_build *.egg-info ctorch/_C.abi3.so ctorch/_build.json
	rm -f $(VENV)/.ctorch-demo $(VENV)/.ctorch-dev

# Stamps: nothing is installed or compiled again unless what it is made from has changed.

$(VENV)/.torch: $(CONSTRAINTS)
	@echo "==> making $(VENV) and installing torch into it (some minutes, once)"
	@$(PYTHON) -c '$(HAS_VERSION)'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77,<82" wheel torch
	@touch $@

$(VENV)/.ctorch-demo: $(VENV)/.torch $(BUILD)
	@echo "==> compiling the kernels and installing ctorch with what the demo needs (some minutes, once)"
	$(INSTALL) -e ".[demo]"
	@touch $@

$(VENV)/.ctorch-dev: $(VENV)/.ctorch-demo
	@echo "==> installing what tests and docs need"
	$(PIP) "ctorch[dev]"
	@touch $@
