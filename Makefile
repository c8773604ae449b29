# Two commands are enough on a fresh machine with Python 3.11 and make:
#   make demo    sets up and trains the demo       make test    sets up and runs the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# A core each for two test processes; more threads than cores slow each other down. With worksteal
# the tests of a file stay together, so that what a module's fixtures make is made once.
WORKERS ?= 2

.PHONY: demo test test-deploy test-security lint format docs docs-update assets clean

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

demo: $(VENV)/core.stamp
	$(BIN)/plait demo demo/$$(date +%Y%m%d-%H%M%S)

test: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST)

# Servers and clients that are killed, and whole runs of them: some minutes. Needs plait[federated].
test-deploy: $(VENV)/dev.stamp
	PLAIT_DEPLOY=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/run/deploy/test_deploy_long.py

# Hostile files, kills, full disks, other users, colluding clients: under half an hour on two cores.
# FUZZ is the CPU time of each of ten targets in seconds. A full disk and another user need root.
FUZZ ?= 120
test-security: $(VENV)/dev.stamp
	PLAIT_FUZZ_SECONDS=$(FUZZ) PLAIT_KILLS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) \
		--dist worksteal tests/security tests/run/test_received.py tests/run/test_bounds.py \
		tests/run/test_nothing_lost.py tests/federated/test_guard.py tests/federated/test_payload.py \
		tests/federated/test_protocol.py tests/run/federated/test_faults.py

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
