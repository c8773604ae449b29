# Two commands are enough on a fresh machine with Python 3.11 and make:
#   make demo    sets up and trains the demo       make test    sets up and runs the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# A core each for two test processes; more threads than cores slow each other down. With worksteal
# the tests of a file stay together, so that what a module's fixtures make is made once.
WORKERS ?= 2
LLAMA := $(VENV)/llama-cpp-python
LOADERS := $(VENV)/loaders
LLAMA_VERSION := $(shell sed -n "s/.*llama-cpp-python==\([0-9.]*\).*/\1/p" pyproject.toml)
OFF := LLAVA_BUILD LLAMA_BUILD_TESTS LLAMA_BUILD_TOOLS LLAMA_BUILD_EXAMPLES LLAMA_BUILD_SERVER \
  LLAMA_BUILD_APP LLAMA_OPENSSL GGML_NATIVE GGML_OPENMP GGML_LLAMAFILE
LLAMA_OPTIONS := $(foreach option,$(OFF),-D$(option)=OFF)

.PHONY: demo test test-parallel test-types test-deploy test-security test-servers test-loaders \
  test-simulations lint format docs docs-update assets bench clean

$(VENV)/core.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/dev.stamp: $(VENV)/core.stamp
	$(PIP) -e ".[dev]"
	touch $@

$(VENV)/docs.stamp: $(VENV)/core.stamp
	$(PIP) -e ".[docs]"
	touch $@

# llama.cpp for the tests of exports: a minute of one core. The source also holds its converters,
# which no package does.
$(VENV)/servers.stamp: $(VENV)/dev.stamp
	rm -rf $(LLAMA) && mkdir -p $(LLAMA)
	$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python -d $(LLAMA) \
	  llama-cpp-python==$(LLAMA_VERSION)
	tar -xzf $(LLAMA)/*.tar.gz -C $(LLAMA) --strip-components 1
	sed -i 's/LLAMA_BUILD_COMMON ON/LLAMA_BUILD_COMMON OFF/' $(LLAMA)/CMakeLists.txt  # half of the build
	CMAKE_BUILD_PARALLEL_LEVEL=2 CMAKE_ARGS="$(LLAMA_OPTIONS)" $(PIP) --no-deps ./$(LLAMA)
	$(PIP) -e ".[serve-test]"
	touch $@

demo: $(VENV)/core.stamp
	$(BIN)/plait demo demo/$$(date +%Y%m%d-%H%M%S)

test: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST)

# Every method in two and in four processes, under DDP and FSDP2, and ten kills: some minutes.
test-parallel: $(VENV)/dev.stamp
	PLAIT_PARALLEL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rP tests/run/parallel

# Servers and clients that are killed, and whole runs of them: some minutes. Needs plait[federated].
test-deploy: $(VENV)/dev.stamp
	PLAIT_DEPLOY=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/run/deploy/test_deploy_long.py

# Every type of the installed peft through run files: some minutes.
test-types: $(VENV)/dev.stamp
	PLAIT_UPSTREAM=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/upstream/test_types.py

# The statistics of comparisons on 1,000 simulated studies for each case: some minutes.
test-simulations: $(VENV)/dev.stamp
	PLAIT_SIMULATIONS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rP tests/run/compare/test_statistics.py

# Exports in llama.cpp itself, on the CPU: about three minutes, and the build the first time.
test-servers: $(VENV)/servers.stamp
	PLAIT_SERVERS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/serving

# Exports read by the loaders of vLLM and SGLang themselves: their wheels are unpacked, 400 MB, and
# not installed. The versions are those that src/plait/upstream/servers.py names.
$(LOADERS):
	mkdir -p $@
	$(BIN)/python -m pip download --quiet --no-deps -d $@ vllm==0.33.0 sglang==0.5.23
	cd $@ && for wheel in *.whl; do \
	  $(abspath $(BIN))/python -m zipfile -e $$wheel . && rm $$wheel; done

test-loaders: $(VENV)/dev.stamp $(LOADERS)
	PLAIT_LOADERS=$(LOADERS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/serving/test_readers.py

# Hostile files, kills, full disks, other users, colluding clients.
# FUZZ is the CPU time of each of ten targets in seconds. A full disk and another user need root.
FUZZ ?= 120
test-security: $(VENV)/dev.stamp
	PLAIT_FUZZ_SECONDS=$(FUZZ) PLAIT_KILLS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) \
		--dist worksteal tests/security tests/run/test_received.py tests/run/test_bounds.py \
		tests/run/test_nothing_lost.py tests/federated/test_guard.py tests/federated/test_payload.py \
		tests/federated/test_protocol.py tests/run/federated/test_faults.py \
		tests/run/compare/test_runs.py

# What methods cost beside peft's LoRA, on docs/performance.md: a quarter of an hour of one idle core.
bench: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speed.ratios all
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speed.counts all
	$(MAKE) docs-update

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check src tests examples docs benchmarks
	$(BIN)/ruff check src tests examples docs benchmarks
	$(BIN)/pyright src

format: $(VENV)/dev.stamp
	$(BIN)/ruff format src tests examples docs
	$(BIN)/ruff check --fix src tests examples docs

# Writes again what is generated from the code: the schema of options, and the tables, help texts
# and example code in docs/ and README.md.
docs-update: $(VENV)/core.stamp
	$(BIN)/python -m plait.run.config
	$(BIN)/python docs/update.py

docs: $(VENV)/docs.stamp
	$(BIN)/mkdocs build --strict

# Pretrains the shipped tiny model again: about five minutes on one core.
assets: $(VENV)/core.stamp
	$(BIN)/python -m plait.assets.pretrain --out src/plait/assets/tiny

clean:
	rm -rf $(VENV) site build dist .pytest_cache .ruff_cache .hypothesis
