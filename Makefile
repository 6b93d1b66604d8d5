# make quickstart: the whole way on real images.   make test: every test.   make test-slurm: the live cluster's alone.   All set the machine up first, once.
PYTHON ?= python3
PY = .venv/bin/python
# By name, not those with most tests first: the longest file has one test, and came last.
LIVE = $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q -m slurm tests/slurm

.DEFAULT_GOAL := help
.PHONY: help setup quickstart compare test test-slurm

help:
	@echo "make quickstart   set up, then cluster the handwritten digits: ends with a table and a report"
	@echo "make compare      set up, then run every method on the digits over three seeds: ends with one table and one page"
	@echo "make test         set up, then run all tests"
	@echo "make test-slurm   the tests on a real Slurm of four nodes on this machine (packages slurm-wlm and munge, root)"

# uv compiles no bytecode by itself: where none may be written later (read-only, PYTHONDONTWRITEBYTECODE) every start would spend 9 s compiling torch.
.venv/.ready: pyproject.toml launch/setup.sh
	@UV_COMPILE_BYTECODE=1 PYTHON=$(PYTHON) bash launch/setup.sh

setup: .venv/.ready

quickstart: .venv/.ready
	@$(PY) launch/local.py configs/quickstart.yaml

compare: .venv/.ready
	@$(PY) -m dist_scan compare --at-once 2 configs/compare_digits.yaml

# The live cluster's tests come after the others: beside them, on two cores, every collective of either waits for turns (32 minutes, not 25).
test: .venv/.ready
	@export OMP_NUM_THREADS=1; status=0; \
	$(PY) -m pytest -n 2 --dist loadfile -q -m "not slurm" tests || status=$$?; \
	echo "the live cluster:"; $(LIVE) || status=$$?; exit $$status

test-slurm: .venv/.ready
	@OMP_NUM_THREADS=1 $(LIVE)
