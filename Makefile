# Two commands for a newcomer: `make demo` and `make test`.  Each installs what is missing into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/fomoe-demo-32x8.Q4_K_M.gguf
STORE := demo-store
BUILD := $(BIN)/python setup.py -q build_ext --inplace

.PHONY: demo test native debug lint bench clean

# Less memory than all experts need, so that they are streamed from the drive while the text appears.
demo: native
	test -f $(STORE)/manifest.json || $(BIN)/fomoe-layout pack $(MODEL) --to $(STORE)
	$(BIN)/fomoe-run $(STORE) --ram 112M -c 1024 -n 80 -s 7 -p "It was a dark and stormy night, and"

test: $(VENV)/.installed-dev native
	$(BIN)/python -m pytest

# What is out of date, and nothing else: a second when nothing is.
native: $(VENV)/.installed
	$(BUILD)

# With asserts, without optimisation.  `make native` does not see the difference: `make clean-native native` goes back.
debug: $(VENV)/.installed-dev clean-native
	FOMOE_BUILD=debug $(BUILD)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(VENV)/.installed-dev native
	$(BIN)/python -m pytest -m bench

$(VENV)/.installed: pyproject.toml
	./tools/system-packages
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e . 'setuptools>=77' 'Cython>=3.1,<4'
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@

.PHONY: clean-native
clean-native:
	rm -f fomoe_io/*.so

clean: clean-native
	rm -rf $(VENV) $(STORE) build dist *.egg-info fomoe_io/_*.c
