# Two commands: `make demo` trains a small vision-language model with a layout per module, `make test` runs every test. And for who
# changes something: `make check` answers in two minutes.
# Each sets up what it needs (a .venv with pinned versions); Python 3.11+ and make are all they ask for.

PYTHON ?= python3
BIN := .venv/bin
# More threads than cores slow several processes down many times over.
export OMP_NUM_THREADS = 1

.PHONY: demo test check families bench clean

demo: .venv/ready
	$(BIN)/python -m meshweave.data.quickstart runs/digits/start
	$(BIN)/meshweave train examples/digits.yaml --set model=runs/digits/start --overwrite
	$(BIN)/python examples/read_digits.py
	$(BIN)/python examples/compare_digits.py

test: .venv/ready
	$(BIN)/python -m pytest

check: .venv/ready  # two minutes: all that can be known without long tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --quick

families: .venv/ready
	rm -rf runs/families
	MESHWEAVE_RECORDS=runs/families $(BIN)/python -m pytest tests/families -k "not documented"
	PYTHONPATH=src:tests $(BIN)/python -m families.table runs/families

bench: .venv/ready
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/nested.py
	$(BIN)/python benchmarks/pipelines.py
	$(BIN)/python benchmarks/heterogeneous.py
	$(BIN)/python benchmarks/data_index.py

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "meshweave needs Python 3.11 or newer, $(PYTHON) is %d.%d; set PYTHON=" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
