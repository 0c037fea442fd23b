# make demo | test | test-frameworks | bench | gpu-check | lint | format | docs | build | wheel | clean
#
# On a fresh machine with Python >= 3.10 and g++, `make demo` and `make test` do all the set-up, in $(VENV).
# Nothing here compares file times of sources: ninja does that, in about a second.

PYTHON ?= python3
VENV   ?= .venv
# Installed only when $(PYTHON) has no torch of its own. Goes to pip as it stands, so that it may name an index
# with PyTorch's small CPU build.
TORCH  ?= torch==2.13.0
# 0: go on in pure Python where the C++ code cannot be built.
export FUSED_SCHED_REQUIRE_CPU ?= 1

PY     := $(VENV)/bin/python
STAMPS := $(VENV)/.stamps
# As pyproject.toml has them: pip does not install them when it builds without isolation.
BUILD_REQUIRES := $(shell sed -n 's/^requires = \[\([^]]*\)\].*/\1/p' pyproject.toml | tr -d ,)
CPP_FILES = $(shell find csrc tests benchmarks 2>/dev/null -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

# $(QUIET) 'what it does' command...: prints one line, and the command's output only if it fails.
QUIET = sh -c 'what=$$1; shift; log=$$(mktemp); echo "  $$what"; \
	if "$$@" >$$log 2>&1; then grep "^fused_sched:" $$log; rm -f $$log; \
	else cat $$log; rm -f $$log; echo "make: failed to $$what" >&2; exit 1; fi; true' --

.PHONY: demo test test-frameworks bench gpu-check lint format docs build wheel clean

demo: build
	@$(PY) examples/digits.py

# make test ARGS='-k clock'
test: build $(STAMPS)/test
	@$(PY) -m pytest $(ARGS)

# DeepSpeed, FSDP2, Trainer, Accelerate and Lightning, in several processes (minutes).
test-frameworks: build $(STAMPS)/test-frameworks
	@$(PY) -m pytest tests/frameworks $(ARGS)

# make bench ARGS='--cases headlines --seconds 1 --out results'
bench: build
	@$(PY) -m benchmarks $(ARGS)

# All that needs a GPU, in less than ten minutes, with the torch that is there and no network. It builds by itself, for
# that GPU alone. The same as `python3 -m benchmarks.gpu_check`, in $(VENV) if that is there. ARGS=--dry-run: on the
# CPU. ARGS='--out DIR': six files into DIR, for a machine whose files you copy back.
gpu-check:
	@$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m benchmarks.gpu_check $(ARGS)

lint: $(STAMPS)/dev
	@$(QUIET) 'lint (ruff check)' $(PY) -m ruff check .
	@$(QUIET) 'lint (ruff format)' $(PY) -m ruff format --check .
	@$(QUIET) 'lint (clang-format)' $(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES)
	@$(QUIET) 'check types (mypy --strict)' $(PY) -m mypy --strict fused_sched

format: $(STAMPS)/dev
	@$(PY) -m ruff check --fix-only --quiet .
	@$(PY) -m ruff format --quiet .
	@$(VENV)/bin/clang-format -i $(CPP_FILES)

# docs/schedules.md, the tables of README.md and their pictures, from the code, from docs/images/quality.json and from
# benchmarks/results/cpu.json and cpu-zen4.json.
docs: build
	@$(PY) docs/make_schedules.py
	@$(PY) docs/make_readme.py

build: $(STAMPS)/installed
	@$(QUIET) 'build' $(PY) setup.py -q build_ext --inplace

wheel: $(STAMPS)/installed
	@$(QUIET) 'build a wheel into dist/' $(PY) -m pip wheel --no-build-isolation --no-deps -w dist .

clean:
	@rm -rf build dist demo_output *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@rm -f fused_sched/*.so fused_sched/_build_info.json
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The environment: a virtual one that sees the torch of $(PYTHON) where there is one.
$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'make: Python 3.10 or newer is needed; name one with PYTHON=...' >&2; exit 1; }
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
		$(QUIET) 'make $(VENV) (with the torch of $(PYTHON))' $(PYTHON) -m venv --system-site-packages $(VENV) && \
		{ $(PY) -c 'import torch' 2>/dev/null || $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
			> "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent_environment.pth"; }; \
	else $(QUIET) 'make $(VENV)' $(PYTHON) -m venv $(VENV); fi

$(STAMPS)/torch: | $(PY)
	@mkdir -p $(STAMPS)
	@$(PY) -c 'import torch' 2>/dev/null || $(QUIET) 'install $(TORCH)' $(PY) -m pip install $(TORCH)
	@touch $@

$(STAMPS)/installed: $(STAMPS)/torch pyproject.toml
	@$(QUIET) 'install the build requirements' $(PY) -m pip install $(BUILD_REQUIRES)
	@$(QUIET) 'install fused_sched (editable) with what the demo needs' \
		$(PY) -m pip install --no-build-isolation -e '.[demo]'
	@touch $@

$(STAMPS)/test: $(STAMPS)/installed
	@$(QUIET) 'install what the tests need' $(PY) -m pip install --no-build-isolation -e '.[test]'
	@# Only its schedulers are read, which need none of its dependencies, torchvision among them.
	@$(QUIET) 'install the schedulers of timm' $(PY) -m pip install --no-deps timm==1.0.31
	@touch $@

$(STAMPS)/test-frameworks: $(STAMPS)/test
	@$(QUIET) 'install the frameworks' env DS_BUILD_OPS=0 \
		$(PY) -m pip install --no-build-isolation -e '.[test-frameworks]'
	@touch $@

$(STAMPS)/dev: $(STAMPS)/installed
	@$(QUIET) 'install the linters' $(PY) -m pip install --no-build-isolation -e '.[dev]'
	@touch $@
