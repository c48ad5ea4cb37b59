# `make demo` and `make test` need nothing but Python 3 and make: they create .venv and install into it once.

PYTHON ?= python3
VENV ?= .venv
# What pip installs as torch; empty: the usual build where nvidia-smi finds a GPU, a CPU build elsewhere.
TORCH ?=
# The newest that is tested; from 5.21 on transformers wants Python 3.11.
TRANSFORMERS ?= $(shell $(PYTHON) -c "import sys; print('transformers==' + ('5.24.0' if sys.version_info >= (3, 11) else '5.20.2'))")
SAMPLE ?= $(firstword $(wildcard samples/*.flac))
# More arguments for pytest, such as ARGS="-m gpu"; with ARGS="-n 0" it runs in one process.
ARGS ?=

# The last pair of which a CPU build is known to serve; a newer torch, taken by itself, may bring gigabytes of CUDA.
CPU_TORCH = 2.13.0
CPU_TRITON = 'triton==3.7.1; platform_system == "Linux"'
# The interpreter of the triton that an older TORCH brings breaks with newer ones.
NUMPY = "from importlib.metadata import distributions as found; \
  print('numpy' + '<2.4' * any(tuple(map(int, t.version.split('.')[:2])) < (3, 7) for t in found(name='triton')))"
OLDEST_TRANSFORMERS = transformers==5.17.0
# The package of PyPI that transformers imports where it finds it, in the last version that this one takes. The newest transformers
# is tested without it.
PYPI_KERNELS = kernels==0.16.2

# Twice quiet: a warning for each package index that lacks a package tells nobody anything. Not compiled: of torch's and
# transformers' thousands of modules few are ever imported, and those Python compiles by itself.
PIP_INSTALL = -m pip install -qq --disable-pip-version-check --no-compile
PIP = $(VENV)/bin/python $(PIP_INSTALL)
# A process a core. Each takes whole test modules, so that what the tests of one share is made once.
PYTEST = -m pytest -n auto --maxprocesses 8 --dist loadfile
INSTALLED = $(VENV)/.installed
OLDEST_VENV = $(VENV)-oldest
# What could come out otherwise with another transformers, or beside that package: its Whisper's modules, caches, generation and
# pipeline beside ours, the command, what becomes of a checkpoint that it loads, what hangs on its models from outside, and who
# gets which `kernels`. Our kernels, the parsers and the benchmarks are the same with any, and real speech takes its time.
WITH_OLDEST = $(patsubst %,tests/test_%.py,attention bad_input_cache bad_input_checkpoints bad_input_damaged bad_input_model \
  cache checkpoints cli compile concurrency ctranslate2 decode_loop decoder early encoded encoder faults language late long_runs \
  odd_calls parity patching prefill stand_ins thresholds token_rules transcription undo) \
  --deselect tests/test_parity.py::TestTinyEn \
  tests/test_packaging.py::test_kernels_are_ours_and_transformers_keeps_its_own

# An environment may forbid Python to keep its bytecode. The suite starts dozens of processes that import torch and
# transformers, which takes more than twice as long where all of it is compiled anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-oldest lint wheel clean

help:
	@echo "make demo         transcribe $(SAMPLE) with the demo model"
	@echo "make test         run all tests; without a GPU the kernels run in Triton's interpreter"
	@echo "make test-oldest  run what touches transformers with the oldest version supported, beside the PyPI package kernels"
	@echo "make lint         ruff check and ruff format --check"
	@echo "make wheel        build a wheel into dist/ and import it from an empty folder"
	@echo "make clean        remove what these targets made, .venv too"
	@echo "Variables: PYTHON=python3.12 TORCH=torch==2.9.1 TRANSFORMERS=transformers==5.20.0 SAMPLE=FILE ARGS='-k cache'"

demo: $(INSTALLED)
	$(VENV)/bin/whisper-triton transcribe $(SAMPLE) --model demo

test: $(INSTALLED)
	$(VENV)/bin/python $(PYTEST) $(ARGS)

test-oldest: $(OLDEST_VENV)/.installed
	$(OLDEST_VENV)/bin/python $(PYTEST) $(WITH_OLDEST) $(ARGS)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

wheel: $(INSTALLED)
	rm -rf build dist
	$(VENV)/bin/python -m build --wheel
	$(PIP) --no-deps --target build/installed dist/*.whl
	test ! -e build/installed/kernels
	cd build/installed && $(abspath $(VENV))/bin/python -c "import whisper_triton; \
	  from whisper_triton import kernels; print('imported', whisper_triton.__file__, kernels.__path__[0])"

clean:
	rm -rf $(VENV) $(OLDEST_VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Editable, so that the command and the tests run what the checkout holds.
$(INSTALLED): setup.py pyproject.toml Makefile whisper_triton/_versions.py
	$(PYTHON) -m venv $(VENV)
	@# Alone first, because this refuses an unsupported Python at once and by name.
	$(PIP) --no-deps -e .
	@if [ -n "$(TORCH)" ]; then \
	  echo "Installing $(TORCH) into $(VENV), once"; $(PIP) '$(TORCH)'; \
	elif nvidia-smi -L >/dev/null 2>&1; then \
	  echo "Installing torch into $(VENV), once"; $(PIP) torch; \
	else \
	  echo "No NVIDIA GPU: installing a CPU build of torch into $(VENV), once"; \
	  $(PIP) torch==$(CPU_TORCH)+cpu $(CPU_TRITON) 2>/dev/null || { \
	    echo "This package index has no build named +cpu: taking its torch $(CPU_TORCH), which may be larger"; \
	    $(PIP) torch==$(CPU_TORCH) $(CPU_TRITON); }; \
	fi
	$(PIP) '$(TRANSFORMERS)' -e '.[demo,dev]' "$$($(VENV)/bin/python -c $(NUMPY))"
	touch $@

# A second venv that sees the first one's packages and installs only what another transformers needs instead.
$(OLDEST_VENV)/.installed: $(INSTALLED)
	rm -rf $(OLDEST_VENV)
	$(VENV)/bin/python -m venv $(OLDEST_VENV)
	$(VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > "$$($(OLDEST_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth"
	$(OLDEST_VENV)/bin/python $(PIP_INSTALL) $(OLDEST_TRANSFORMERS) $(PYPI_KERNELS) -e '.[demo,dev]'
	$(OLDEST_VENV)/bin/python -c "from transformers.utils import is_kernels_available; assert is_kernels_available()"
	touch $@
