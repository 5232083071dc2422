# Two commands for a newcomer: `make demo` and `make test`.  Each installs what is missing into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/fomoe-demo-32x8.Q4_K_M.gguf
STORE := demo-store
BUILD := $(BIN)/python setup.py -q build_ext --inplace

.PHONY: demo test native debug lint format bench sanitize sanitize-address sanitize-thread stress dist site
.PHONY: clean clean-native

# Less memory than all experts need, so that they are streamed from the drive while the text appears.
demo: native
	test -f $(STORE)/manifest.json || $(BIN)/fomoe-layout pack $(MODEL) --to $(STORE)
	$(BIN)/fomoe-run $(STORE) --ram 112M -c 1024 -n 80 -s 7 -p "It was a dark and stormy night, and"

test: $(VENV)/.installed-dev native
	$(BIN)/python -m pytest

# What is out of date, and nothing else: a second when nothing is.
native: $(VENV)/.installed
	$(BUILD)

# The tree's modules with asserts, without optimisation.  `make native` does not see the difference: `make clean-native
# native` goes back.  (tools/test-build debug tests/unit/test_residency.py runs tests on a copy instead.)
debug: $(VENV)/.installed-dev clean-native
	FOMOE_BUILD=debug $(BUILD)

CFORMAT = git ls-files '*.c' '*.h' '*.hip' | xargs $(BIN)/clang-format
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/cython-lint fomoe_io
	$(CFORMAT) --dry-run -Werror
	git ls-files | grep -v -E '\.(json|png|gguf)$$' | xargs $(BIN)/codespell
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format . && $(CFORMAT) -i

# Small pieces by themselves, in less than a minute.  Whole models: the scripts in bench/.
bench: $(VENV)/.installed-dev native
	$(BIN)/python -m pytest -m bench tests/bench

# Copies in build/: the tree's own modules stay as they are.  2,300 mutated inputs, and tests of what is native; then
# what runs in several threads (threads after a fork are beyond ThreadSanitizer).
sanitize: sanitize-address sanitize-thread
sanitize-address: $(VENV)/.installed-dev
	tools/test-build address -m "fuzz or not (slow or gpu or bench)" tests/fuzz tests/unit/test_native_ops.py \
	    tests/unit/test_residency.py tests/unit/test_store.py tests/io/test_fake_ring.py tests/io/test_reader.py \
	    tests/engine/test_engine_reference.py
sanitize-thread: $(VENV)/.installed-dev
	tools/test-build thread tests/io/test_reader.py tests/io/test_mirror.py tests/engine/test_interrupts.py \
	    tests/engine/test_lookahead.py tests/engine/test_turns.py tests/engine/test_sessions.py \
	    tests/gpu/test_hip_fake.py tests/gpu/test_device_turns.py tests/gpu/test_device_sessions.py -k "not fork"

# The same tests again and again while the processors are busy with more than they can do: make stress N=50 TESTS=...
N ?= 20
TESTS ?= tests/engine/test_interrupts.py tests/engine/test_lookahead.py tests/io/test_reader.py
stress: $(VENV)/.installed-dev native
	$(BIN)/python tools/stress.py -n $(N) $(TESTS)

# The pages of docs/, as a site in build/site; a link that leads nowhere fails.
site: $(VENV)/.installed-dev
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict

# sdist and wheel, liburing inside.
dist: $(VENV)/.installed-dev
	FOMOE_STATIC_LIBURING=1 $(BIN)/python -m build

$(VENV)/.installed: pyproject.toml
	./tools/system-packages
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e . 'setuptools>=77' 'Cython>=3.1,<4'
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@

clean-native:
	rm -f fomoe_io/*.so

clean: clean-native
	rm -rf $(VENV) $(STORE) build dist *.egg-info fomoe_io/_*.c
