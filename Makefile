# Every target except help first runs launch/setup.sh, once.
PYTHON ?= python3
PY = .venv/bin/python
SOURCES = dist_scan launch tests benchmarks
# --no-loadscope-reorder starts the files in the order of their names. pytest would start the file with
# the fewest tests last, and that one takes longest.
TEST_CLUSTER = $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q -m slurm tests/slurm

.DEFAULT_GOAL := help
.PHONY: help setup lint format quickstart compare test test-fast test-slurm

help:
	@echo "make quickstart   cluster the handwritten digits; ends with a table and a report"
	@echo "make compare      run every method on the digits over three seeds; ends with one table and one page"
	@echo "make lint         formatter, linter and type checker"
	@echo "make format       format the sources and apply the linter's safe fixes"
	@echo "make test-fast    the unit tests, in parallel"
	@echo "make test         every test"
	@echo "make test-slurm   the tests on the test cluster: a real Slurm of four nodes on this machine"
	@echo "                  (needs the packages slurm-wlm and munge, and root)"

# uv does not compile bytecode. Where none can be written later (a read-only folder,
# PYTHONDONTWRITEBYTECODE), every start would spend 9 s on compiling torch.
.venv/.ready: pyproject.toml launch/setup.sh
	@UV_COMPILE_BYTECODE=1 PYTHON=$(PYTHON) bash launch/setup.sh

setup: .venv/.ready

lint: .venv/.ready
	@$(PY) -m ruff format --check $(SOURCES)
	@$(PY) -m ruff check $(SOURCES)
	@$(PY) -m mypy

format: .venv/.ready
	@$(PY) -m ruff check --fix --exit-zero -q $(SOURCES)
	@$(PY) -m ruff format $(SOURCES)

quickstart: .venv/.ready
	@$(PY) launch/local.py configs/quickstart.yaml

compare: .venv/.ready
	@$(PY) -m dist_scan compare --at-once 2 configs/compare_digits.yaml

test-fast: .venv/.ready
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile -q tests/unit

# The tests on the test cluster run after the others. Side by side on two cores, the collective
# operations of both wait for a free core (32 minutes in all instead of 25).
test: .venv/.ready
	@export OMP_NUM_THREADS=1; status=0; \
	$(PY) -m pytest -n 2 --dist loadfile -q -m "not slurm" tests || status=$$?; \
	echo "on the test cluster:"; $(TEST_CLUSTER) || status=$$?; exit $$status

test-slurm: .venv/.ready
	@OMP_NUM_THREADS=1 $(TEST_CLUSTER)
