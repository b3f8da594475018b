# Every target but gpu does its own set-up: a virtual environment, the packages that it needs and the native library. A
# second call is quick: ninja compiles only the sources that changed.
#
#   make demo     fill real photos, and measure this library against the naive op on this machine
#   make test     the test suite, without the tests marked slow
#   make bench    the benchmarks and the slow tests
#   make gpu      on a machine with a GPU: build, tests and benches in at most nine minutes, with the torch of PYTHON=
#   make wheel    dist/: a wheel for Linux with CPU and CUDA kernels, and a pure-Python one for everything else
#   make lint     ruff, mypy, clang-format
#   make build    only the set-up: the packages of the command line, and what changed is compiled
#   make clean    remove what was built; the virtual environment stays
#
# VENV=<folder> uses another virtual environment, PYTHON=<interpreter> the Python to make it with. A torch that is
# already in the environment is kept.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

# On Linux the ordinary wheel of torch brings gigabytes of CUDA libraries, which only a machine with a GPU can use: without
# one the CPU build is tried first. Where pip's configured index has none, name PyTorch's own in
# TORCH_PIP_OPTIONS="--index-url <address>".
TORCH_VERSION ?= 2.13.0
TORCH_PIP_OPTIONS ?=
BENCH_JSON ?= build/benchmark.json

# Marks of what the environment has: torch and the build tools, the native library, the package with an extra.
TOOLS := $(VENV)/.inpaint-kernels-tools
COMPILED := $(VENV)/.inpaint-kernels-compiled
WITH := $(VENV)/.inpaint-kernels-with

.PHONY: demo test bench gpu wheel lint build clean

demo: $(WITH)-demo $(COMPILED)
	$(PY) benches/demo.py

test: $(WITH)-dev $(COMPILED)
	$(PY) -m pytest -q -m "not slow" -n logical

bench: $(WITH)-dev $(COMPILED)
	$(PY) -m pytest benches --benchmark-json=$(BENCH_JSON)
	$(PY) -m pytest -q -m slow

gpu:
	@$(PYTHON) -c "import torch, pytest" || { echo "make gpu needs torch and pytest in $(PYTHON)"; exit 2; }
	@$(PYTHON) -m benches.gpu

# auditwheel proves the platform by the symbols that the library needs, and names it in the wheel's tag. torch's own
# libraries are not packed.
WHEEL_PLATFORM ?= manylinux_2_28_$(shell uname -m)
wheel: $(WITH)-dev
	rm -rf build/wheels dist/*.whl
	INPAINT_CUDA=$${INPAINT_CUDA:-1} $(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheels .
	PATH="$(abspath $(VENV)/bin):$$PATH" $(PY) -m auditwheel repair --plat $(WHEEL_PLATFORM) --only-plat \
	  --exclude libtorch.so --exclude libtorch_cpu.so --exclude libc10.so --wheel-dir dist build/wheels/*.whl
	INPAINT_NATIVE=0 INPAINT_CUDA=0 $(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	ls -l dist/*.whl

lint: $(WITH)-dev $(COMPILED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $$(find csrc tests/emulation -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

build: $(WITH)-cli $(COMPILED)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	rm -f inpaint_kernels/libinpaint_native.so inpaint_kernels/_build.json $(COMPILED)
	find benches inpaint_kernels models tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	$(PYTHON) -m venv $(VENV)

$(TOOLS): | $(PY)
	$(PIP) install --quiet --upgrade "pip>=24" "setuptools>=77" wheel "ninja>=1.11"
	$(PY) -c "import torch" 2>/dev/null || $(MAKE) --no-print-directory torch
	touch $@

$(COMPILED): setup.py $(shell find csrc -type f) | $(TOOLS)
	$(PY) setup.py --quiet build_native --inplace
	touch $@

$(WITH)-%: pyproject.toml | $(COMPILED)
	$(PIP) install --quiet --no-build-isolation --editable ".[$*]"
	touch $@

.PHONY: torch
torch:
	if nvidia-smi -L >/dev/null 2>&1 || [ "$$(uname -s)" != Linux ]; then \
	  $(PIP) install --quiet $(TORCH_PIP_OPTIONS) "torch==$(TORCH_VERSION)"; \
	else \
	  $(PIP) install --quiet $(TORCH_PIP_OPTIONS) "torch==$(TORCH_VERSION)+cpu" 2>/dev/null || \
	  $(PIP) install --quiet $(TORCH_PIP_OPTIONS) "torch==$(TORCH_VERSION)"; \
	fi
