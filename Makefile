# Everything a newcomer or CI runs. Needs git, make and Python 3.11 or newer; the rest is installed into .venv.
#   make demo            the whole system on real servers, a demonstration, then serving until Ctrl-C
#   make demo ARGS=--once   the demonstration alone
#   make test            every check
#   make faults          everything broken that can break, for half an hour, and what it cost; ARGS=--help
#   make soak            a steady load with faults for 20 minutes: does anything grow; ARGS=--help
#   make bench           how fast it is, beside the usual designs, in ten minutes; ARGS=--help
#   make fuzz            what reads others' bytes, fuzzed for a minute; ARGS="--seconds 600" for longer
#   make lock            after a change of dependencies in pyproject.toml
.DEFAULT_GOAL := help
.PHONY: help demo test lint types unit integration acceptance faults soak bench fuzz format lock clean
ARGS ?=
# The first Python that is new enough; PYTHON=/path/to/python overrides.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)

help:
	@sed -n 's/^#   //p' Makefile

# uv.lock names versions and hashes but no download host, so the packages come from whichever index this machine uses.
$(READY): pyproject.toml uv.lock
	@test -n "$(PYTHON)" || { echo "clerk-sync needs Python 3.11 to 3.14 on PATH (or make PYTHON=/path/to/python)" >&2; exit 2; }
	@$(PYTHON) -m venv --clear .venv || { echo "could not make .venv: install your system's python3-venv package" >&2; exit 2; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9,<1'
	@$(BIN)/uv export --quiet --frozen --no-emit-project --no-header --no-annotate --output-file .venv/requirements.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --requirements .venv/requirements.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

demo: $(READY)
	@$(BIN)/clerk-sync demo $(ARGS)

test: lint types unit integration acceptance

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache

types: $(READY)
	$(BIN)/mypy

# Two processes, each with servers of its own; a file's tests share what they set up, but for unit tests.
unit integration acceptance: $(READY)
	$(BIN)/pytest --numprocesses 2 --dist $(if $(filter unit,$@),load,loadfile) tests/$@ $(ARGS)

# In an environment of its own, so that the tests' isn't changed. What it learns stays in .fuzz.
FUZZ := .fuzz/venv
fuzz: $(READY)
	@$(BIN)/python -c 'import platform, sys; sys.exit((sys.platform, platform.machine()) != ("linux", "x86_64") or sys.version_info >= (3, 14))' \
		|| { echo "make fuzz needs Linux on x86_64 and Python 3.11 to 3.13: atheris has no wheels for others" >&2; exit 0; }; \
	test -e $(FUZZ)/.ready -a ! $(READY) -nt $(FUZZ)/.ready || { \
		$(PYTHON) -m venv --clear $(FUZZ) \
		&& $(BIN)/uv export --quiet --frozen --no-emit-project --no-header --no-annotate --no-default-groups --group fuzz \
			--output-file $(FUZZ)/requirements.txt \
		&& $(BIN)/uv pip install --quiet --python $(FUZZ)/bin/python --require-hashes --requirements $(FUZZ)/requirements.txt \
		&& touch $(FUZZ)/.ready; } && $(FUZZ)/bin/python -m tests.fuzz.fuzz $(ARGS)

faults: $(READY)
	@$(BIN)/python -m tests.faults $(ARGS)

soak: $(READY)
	@$(BIN)/python -m tests.faults.soak $(ARGS)

bench: $(READY)
	@$(BIN)/python -m bench $(ARGS)

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lock: $(READY)
	$(BIN)/uv lock
	sed -E 's#https://[^/"]+/(simple"|packages/)#https://index.invalid/\1#' uv.lock > .venv/uv.lock && cp .venv/uv.lock uv.lock

clean:
	@test ! -e .clerk-sync -o ! -x $(BIN)/python || $(BIN)/python -c 'import pathlib, worker.local as l; l.discard(pathlib.Path(".clerk-sync"))'
	rm -rf tests/node/node_modules tests/node/.lock .venv .fuzz .clerk-sync .mypy_cache .ruff_cache .pytest_cache .hypothesis
