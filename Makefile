# make demo   few-step pictures from the embedded miniature pipeline, before and after
# make app    a page that draws while you type, with the same pipeline
# make test   the tests
# make browser   Debian's chromium, for the tests of the page
# make lint   ruff, types, import contracts
# make artifact   the miniature's accelerator as people publish one: delta, LoRAs, card, pictures
# make miniature   trains everything that is embedded, from the committed pictures (about 2.5 hours on 2 cores)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo app browser test lint artifact miniature quality clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp an extra: the demo needs neither the tests' nor the linters' packages.
$(VENV)/.demo: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing perflow-diffusers into $(VENV) (torch and diffusers: a few minutes the first time)"
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing perflow-diffusers and its test tools into $(VENV)"
	$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.demo $(VENV)/.app

demo: $(VENV)/.demo
	$(BIN)/perflow demo

$(VENV)/.app: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing perflow-diffusers and Gradio into $(VENV)"
	$(PIP) -e ".[app]"
	@touch $@ $(VENV)/.demo

app: $(VENV)/.app
	$(BIN)/perflow app

browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && S= || S=sudo; $$S apt-get update -q && $$S apt-get install -q -y chromium; }

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=training $(BIN)/lint-imports

artifact: $(VENV)/.dev
	$(BIN)/python training/miniature/make_artifact.py runs/miniature/artifact

miniature: $(VENV)/.dev
	$(BIN)/python training/miniature/make_miniature.py

quality: $(VENV)/.dev
	$(BIN)/python benchmarks/miniature_quality.py

clean:
	rm -rf $(VENV) build src/*.egg-info
