# make run    the quickstart: concat against MI on real text and on eight tasks of an agent, each
#             with a conclusion, in ten minutes
# make test   lint, format, types, and the tests that take seconds
# make test_slow   the tests that train, start programs or compile for other machines
# make check  lint, format and types
# make docs   the documentation in site/; its search needs a server: python3 -m http.server -d site
# Everything runs in .venv, which is made on first use with Python 3.11 to 3.14, and has pip.

PYTHON ?= $(shell for p in python3.12 python3.13 python3.14 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null \
	&& echo $$p && break; done)
BIN = .venv/bin
WORKDIR ?= runs/quickstart
PARALLEL ?= 2

.PHONY: run test test_slow check docs clean

run: .venv/run
	$(BIN)/python -m launch.local \
		--sweep=experiments/quickstart.py --workdir=$(WORKDIR) --parallel=$(PARALLEL)
	$(BIN)/python -m launch.local \
		--sweep=experiments/quickstart_rl.py --workdir=$(WORKDIR)_rl --parallel=$(PARALLEL)
	@echo
	@cat $(WORKDIR)/report/conclusions.txt $(WORKDIR)_rl/report/conclusions.txt

PYTEST = $(BIN)/python -m pytest -n $(PARALLEL) --dist worksteal --durations=20

test: check
	$(PYTEST) -m 'not slow'

test_slow: .venv/test
	$(PYTEST) -m slow

check: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: export NO_MKDOCS_2_WARNING = 1
docs: .venv/docs
	$(BIN)/mkdocs build

.venv/run: EXTRA = [sweep]
.venv/test: EXTRA = [test]
.venv/docs: EXTRA = [docs]
.venv/run .venv/test .venv/docs: setup.py pyproject.toml requirements/lock.txt
	@test -n "$(PYTHON)" || { echo 'error: Python 3.11 to 3.14 is needed: install one, or make PYTHON=/path/to/python3.12'; exit 1; }
	@if command -v uv >/dev/null; then \
		uv venv --quiet --allow-existing --seed --python "$(PYTHON)" .venv && \
		uv pip install --quiet --python $(BIN)/python -e '.$(EXTRA)' -c requirements/lock.txt; \
	else \
		"$(PYTHON)" -m venv .venv && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check \
			-e '.$(EXTRA)' -c requirements/lock.txt; \
	fi
	@touch $@

clean:
	rm -rf .venv build site *.egg-info
