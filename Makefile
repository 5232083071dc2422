# Two commands for a newcomer: `make demo` and `make test`.  Each installs what is missing into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/fomoe-demo-32x8.Q4_K_M.gguf
STORE := demo-store
SOURCES := setup.py pyproject.toml Makefile $(shell find fomoe_io layout_tool -name '*.py' -o -name '*.pyx' -o -name '*.px[di]' -o -name '*.[ch]' -o -name '*.hip')

.PHONY: demo test lint bench clean

# Less memory than all experts need, so that they are streamed from the drive while the text appears.
demo: $(VENV)/.installed
	test -f $(STORE)/manifest.json || $(BIN)/fomoe-layout pack $(MODEL) --to $(STORE)
	$(BIN)/fomoe-run $(STORE) --ram 112M -c 1024 -n 80 -s 7 -p "It was a dark and stormy night, and"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m bench

$(VENV)/.installed: $(SOURCES)
	./tools/system-packages
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check .
	touch $@

# The tests use the extensions where they are built, in the tree.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(STORE) build dist *.egg-info fomoe_io/*.so fomoe_io/_*.c
