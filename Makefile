# Set-up, demo and tests. Everything stays inside this folder: the virtual environment in .venv, results in build.

PYTHON ?= $(shell python3.11 -c "print('python3.11')" 2>/dev/null || echo python3)
TORCH ?= torch==2.13.0
PYTEST_ARGS ?= -n 2 --dist loadfile
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEPENDENCIES := pyproject.toml constraints.txt Makefile

.PHONY: demo test quick lower-bounds lint types clean help

help:
	@echo "make demo    export tiny-llava with a 1-bit visual cache and read a page with it"
	@echo "make test    lint, types, all tests: what CI runs"
	@echo "make quick   the same without the matrix of families, tests/families"
	@echo "make lower-bounds"
	@echo "             a few tests with the oldest packages that pyproject.toml allows"
	@echo "make lint    mypy, import-linter, ruff and clang-format only"
	@echo "make clean   remove .venv and build"

demo: .venv/demo-ready
	@mkdir -p build
	@$(BIN)/python examples/demo.py

test: lint .venv/triton-ready
	@echo "tests: 18 to 25 minutes on 2 cores"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

# Packages of the oldest versions that pyproject.toml allows, in an environment of their own; what it does not have, torch
# above all, comes from .venv, behind them. uv finds the oldest; it does not read pip's settings, but UV_INDEX_URL.
LOWEST := build/lowest
LOWEST_TESTS := tests/core tests/runtime/backends/test_onnxruntime.py tests/cli/test_verbs.py
LOWEST_NAMES := core or (overloads_are_not_known and float16 and not bfloat16) or run_json or test_inspect or validate_finds

lower-bounds: $(LOWEST)/ready
	@echo "tests with the oldest packages: 1 minute"
	@OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest $(LOWEST_TESTS) -k "$(LOWEST_NAMES)"

$(LOWEST)/ready: pyproject.toml tests/helpers/lower_bounds.py .venv/test-ready
	@$(BIN)/python -m venv --clear --without-pip $(LOWEST)
	@$(BIN)/python tests/helpers/lower_bounds.py > $(LOWEST)/requirements.txt
	@$(BIN)/uv pip install --quiet --python $(LOWEST) --resolution lowest-direct -r $(LOWEST)/requirements.txt
	@$(LOWEST)/bin/python tests/helpers/lower_bounds.py --check
	@$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
		> $$($(LOWEST)/bin/python -c "import site; print(site.getsitepackages()[0])")/zz-shared.pth
	@touch $@

lint: types
	@cd build/types && $(CURDIR)/$(BIN)/lint-imports $(CURDIR)/pyproject.toml --no-logo
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'plugins/*.cu' 'plugins/*.cuh' 'plugins/*.cpp' 'plugins/*.h' 'plugins/*.inc')

quick: lint .venv/triton-ready
	@echo "tests: 12 to 17 minutes on 2 cores"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) --ignore tests/families

# mypy and import-linter do not see through the package-dir table of pyproject.toml: they get the packages as folders of links.
types: .venv/test-ready
	@rm -rf build/types && mkdir -p build/types/vkvx
	@ln -s $(CURDIR)/vkvx/* $(CURDIR)/evaluation $(CURDIR)/export $(CURDIR)/models $(CURDIR)/plugins $(CURDIR)/runtime build/types/vkvx/
	@cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p vkvx

# torch comes first and pinned: as a dependency of another package pip would take its newest and largest build.
.venv/torch-ready: $(DEPENDENCIES)
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11')"
	@echo "installing torch, 1 to 5 minutes, into .venv"
	@$(PYTHON) -m venv .venv
	@$(PIP) $(TORCH)
	@touch $@

.venv/demo-ready: .venv/torch-ready
	@echo "installing vkvx and what it needs, about 1 minute"
	@$(PIP) --editable ".[export,onnxruntime]"
	@touch $@

.venv/test-ready: .venv/torch-ready
	@echo "installing vkvx and its development tools, about 1 minute"
	@$(PIP) --editable ".[dev]"
	@$(PIP) --no-deps kernel-lens # for the TensorRT headers in it; what it depends on is large, and not needed
	@touch $@

.venv/triton-ready: .venv/test-ready tests/helpers/triton_server.py
	@echo "installing Triton Inference Server for its tests, 73 MB of downloads, into .venv/triton"
	@$(BIN)/python tests/helpers/triton_server.py
	@touch $@

clean:
	rm -rf .venv build .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
