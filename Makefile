# The only ways in. `make help` lists them.

VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml requirements.lock hatch_build.py $(wildcard src/echelon/models/kernels/*.cpp src/echelon/models/kernels/*.h)
PYTHON ?= python3
AUDIT := .venv-audit
WHEELS := .venv-wheels
TRITON := .venv-triton
TRITON_VERSION ?= 3.7.1
SBOM ?= echelon-sbom.json
MODEL ?= demo
TESTS ?=
TORCH ?= 2.12.1
# Two processes share the files of tests; a test in a file after another finds what it opened.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10
# What torch, oneDNN and Echelon then take the processor for.
OLD_CPU := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ECHELON_CPU=avx2

.DEFAULT_GOAL := help
.PHONY: help demo demo-profile test test-portable test-triton test-cuda-shim test-arm check docs docs-site bench soak lock-hashes sbom audit wheels clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## install, fetch the demo model, rank an example, tune it (at most two minutes)
	@$(BIN)/echelon pull demo
	@$(BIN)/python examples/quickstart.py
	@$(BIN)/echelon tune $(MODEL) --profile echelon-profile.json --report echelon-report.html
	@echo; echo "Next: source $(BIN)/activate"
	@echo "      pip install -c requirements.lock -e '.[serve]'"
	@echo "      echelon serve $(MODEL) --profile echelon-profile.json"

test: $(VENV)/.installed-test ## install with the test extras and run the tests (a part: TESTS="...")
	$(PYTEST) $(TESTS)

test-portable: $(VENV)/.installed-test ## the same as on a processor with AVX2 and nothing newer
	$(OLD_CPU) $(PYTEST) $(TESTS)

test-triton: $(TRITON)/.installed ## run the kernels for cards in Triton's interpreter, and compile them for each card
	$(TRITON)/bin/python -m pytest -q tests/models/test_triton.py

test-cuda-shim: .venv-torch-$(TORCH)/.installed ## the tests of cards made of shims, with another torch (TORCH=2.12.1, of CUDA: 3 GB)
	.venv-torch-$(TORCH)/bin/python -m pytest -n 2 --dist loadfile tests/cuda tests/models/test_graphs.py

test-arm: $(VENV)/.installed-test ## compile the kernels for 64-bit ARM and run their tests in an emulator
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool >/dev/null || missing=1; done; \
	  test -z "$$missing" || apt-get install -y -qq g++-aarch64-linux-gnu qemu-user || { \
	  echo "make: no compiler or emulator. On Debian, as root: apt install g++-aarch64-linux-gnu qemu-user"; exit 1; }
	KERNELS_MACHINE=aarch64 $(BIN)/python -m pytest tests/models/test_kernels.py tests/models/test_causal_kernel.py

check: $(VENV)/.installed-test ## style, types, import directions, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/house/test_docs.py

docs: $(VENV)/.installed-test ## write the tree of files and the table of limits into docs/, and build the site
	$(BIN)/python scripts/doc_parts.py
	@$(MAKE) docs-site

docs-site: $(VENV)/.installed-test ## build the documentation as a site that needs no network (build/site)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

demo-profile: $(VENV)/.installed-test ## measure examples/demo-profile.json anew and draw docs/tune.png (on a quiet machine)
	$(BIN)/python scripts/demo_profile.py

bench: $(VENV)/.installed-test ## measure Echelon beside its peers (long; results under benchmarks/results)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c requirements.lock -e '.[torch,test,bench]'
	$(BIN)/python benchmarks/peers.py $(BENCH)

soak: $(VENV)/.installed-test ## serve good, bad, slow and vanishing clients for SOAK_MIN minutes (30): does anything grow?
	$(BIN)/python benchmarks/soak.py

lock-hashes: $(VENV)/bin/python ## write requirements.hashes.lock: the pins with the hashes of their files
	$(BIN)/python scripts/lock.py

sbom: $(VENV)/.installed $(AUDIT)/.installed ## write what is installed as CycloneDX JSON (SBOM=echelon-sbom.json)
	@$(AUDIT)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON -o $(SBOM) $(VENV)

audit: $(AUDIT)/.installed ## ask the index of vulnerabilities about every pin (needs the network)
	@$(AUDIT)/bin/pip-audit --strict --disable-pip --require-hashes -r requirements.hashes.lock || { \
	  echo "make: a pin is vulnerable, or the index of vulnerabilities did not answer for all of them (see above)."; exit 1; }

wheels: $(WHEELS)/.installed ## build the source distribution and the wheels into dist/, audit and try them
	$(WHEELS)/bin/python scripts/wheels.py

clean: ## remove the environments and caches
	rm -rf $(VENV) $(AUDIT) $(TRITON) $(WHEELS) .venv-torch-* .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found. Install Python 3.11 or newer, or name it: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is older than 3.11. Name a newer one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "make: no venv module. On Debian: apt install python3-venv"; exit 1; }

$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c requirements.lock -e '.[torch]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/bin/python $(SOURCES) $(VENV)/.installed-helm
	$(BIN)/python -m pip install -q --disable-pip-version-check -c requirements.lock -e '.[torch,test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-helm: $(VENV)/bin/python requirements.helm.lock
	$(BIN)/python scripts/get_helm.py
	@touch $@

# Triton beside the environment of the tests, whose packages it sees: torch's CPU build has none.
# Files of paths are not followed in there, so the sources are named too.
$(TRITON)/.installed: $(VENV)/.installed-test
	$(BIN)/python -m venv $(TRITON)
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > $$($(TRITON)/bin/python -c 'import site; print(site.getsitepackages()[0])')/tests.pth
	echo $(CURDIR)/src >> $$($(TRITON)/bin/python -c 'import site; print(site.getsitepackages()[0])')/tests.pth
	$(TRITON)/bin/python -m pip install -q --disable-pip-version-check --no-deps triton==$(TRITON_VERSION)
	@touch $@

# Without the pins of torch and of what it brings.
.venv-torch-%/.installed: $(VENV)/bin/python pyproject.toml requirements.lock
	$(PYTHON) -m venv $(@D)
	grep -viE '^(torch|triton|setuptools|nvidia-|cuda-)' requirements.lock > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install -q --disable-pip-version-check -c $(@D)/constraints.txt 'torch==$*' -e '.[torch,serve]' aiohttp pbr pytest pytest-randomly pytest-xdist hypothesis scipy httpx
	$(@D)/bin/python -m pip install -q --disable-pip-version-check --no-deps -c $(@D)/constraints.txt hdrhistogram # older torch wants other setuptools
	@touch $@

# Apart, so that the tools are not among what they list or build.
.venv-%/.installed: $(VENV)/bin/python pyproject.toml requirements.hashes.lock
	$(BIN)/python -m venv $(@D)
	$(BIN)/python scripts/lock.py --select $* > $(@D)/requirements.txt
	$(@D)/bin/python -m pip install -q --disable-pip-version-check --require-hashes --no-deps -r $(@D)/requirements.txt
	@touch $@
