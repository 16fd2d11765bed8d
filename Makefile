# demo, test, test-all, test-faults, check, bench, docs: each makes .venv itself, with the exact versions of requirements/.
PYTHON ?= python3

.PHONY: demo test test-all test-faults check bench docs
demo: .venv/.made ; @.venv/bin/diffrc run digits-lt
test: .venv/.made ; @.venv/bin/python -m pytest -m "not slow" -n 2 --dist loadfile --max-worker-restart 0
test-all: .venv/.made ; @.venv/bin/python -m pytest
test-faults: .venv/.made ; @.venv/bin/python -m pytest -m slow tests/faults tests/hostile
check: .venv/.made ; @.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy
bench: .venv/.made ; @.venv/bin/python tests/bench_training.py && .venv/bin/diffrc bench --network small --guided --batch 32 --mode throughput --turns 4
docs: .venv/.made ; @PYTHONPATH=. .venv/bin/python tests/command_pages.py

.venv/.made: requirements/core.txt requirements/cpu.txt requirements/test.txt pyproject.toml
	@echo "making .venv (torch is large: this takes some minutes the first time)"
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --requirement requirements/test.txt
	@.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
