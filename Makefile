# make demo   few-step pictures from the embedded miniature pipeline, before and after
# make app    a page that draws while you type, with the same pipeline
# make test   the tests
# make browser   Debian's chromium, for the tests of the page
# make lint   ruff, types, import contracts
# make package   dist/: the wheel and the sdist, each tried as its users would
# make artifact   the miniature's accelerator as people publish one: delta, LoRAs, card, pictures
# make miniature   trains everything that is embedded, from the committed pictures (about 2.5 hours on 2 cores)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.DEFAULT_GOAL := demo
.PHONY: demo app browser test lint package artifact miniature quality clean

# .venv is whole where its Python is new enough and has pip, and no installation into it was cut off; else it is made anew,
# and with it all stamps. A failed installation leaves its stamp out, and is done again.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
WHOLE := test ! -e $(VENV)/.installing && $(BIN)/python -c 'import pip; $(NEW_ENOUGH)'
ifneq ($(shell ($(WHOLE)) 2>/dev/null && echo yes),yes)
.PHONY: $(VENV)/pyvenv.cfg
endif

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c '$(NEW_ENOUGH)' 2>/dev/null || { \
	echo "perflow-diffusers needs Python 3.11 or newer, and PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo 'not found')." >&2; \
	echo "Name a newer one: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)

# One stamp an extra: the demo needs neither the tests' nor the linters' packages.
define install
	@echo "Installing $(1) into $(VENV) (torch and diffusers: a few minutes the first time)"
	@touch $(VENV)/.installing
	@status=0; $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(2) || status=$$?; \
	rm -f $(VENV)/.installing; exit $$status
	@touch $@
endef

REQUIRED := setup.cfg pyproject.toml constraints.txt $(VENV)/pyvenv.cfg

$(VENV)/.demo: $(REQUIRED)
	$(call install,perflow-diffusers,-e .)

$(VENV)/.app: $(REQUIRED)
	$(call install,perflow-diffusers and Gradio,-e ".[app]")
	@touch $(VENV)/.demo

$(VENV)/.dev: $(REQUIRED) requirements-dev.txt training/requirements.txt
	$(call install,perflow-diffusers and its test tools,-e ".[app]" -r requirements-dev.txt)
	@touch $(VENV)/.demo $(VENV)/.app

demo: $(VENV)/.demo
	$(BIN)/perflow demo

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

package: $(VENV)/.dev
	$(BIN)/python .ci/try_package.py

artifact: $(VENV)/.dev
	$(BIN)/python training/miniature/make_artifact.py runs/miniature/artifact

miniature: $(VENV)/.dev
	$(BIN)/python training/miniature/make_miniature.py

quality: $(VENV)/.dev
	$(BIN)/python benchmarks/miniature_quality.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info
