# Everything that people and CI run. `make help` lists it.

# Plain assignments, so that HOST and PORT of the calling shell do not leak in; `make serve PORT=9000` overrides them.
HOST   = 127.0.0.1
PORT   = 8000
SEEDS  = 1
OPS    = 200000
SEED   = 1
ROUNDS = 200
KILLS  = 20
QEMU   = qemu-system-x86_64
SEQUENCES = 100000
MINUTES = 20
COUNT  = 1000000
SECONDS = 30
STORE  = sqlite
BASE   = HEAD~1
ARGS   =
JOBS   = auto
PYTHON ?= python3

VENV      := .venv
BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEVELOPED := $(VENV)/.developed
SCALED    := $(VENV)/.scaled
WARMED    := $(VENV)/.warmed
COVERAGE  := build/coverage

# What the contract is linted with and clients are generated with: a Python environment and packages of npm, both apart.
CLIENTS      := tests/clients
CLIENTS_VENV := build/clients
CLIENTS_NODE := build/node
SPECTRAL     := $(CLIENTS_NODE)/node_modules/.bin/spectral
NPM          := npm --no-audit --no-fund --ignore-scripts --loglevel=error

ENGINE_SOURCES := $(shell find engine -name '*.py' 2>/dev/null)
# The tests that need no service: what the engine's coverage is measured with.
ENGINE_TESTS   := $(wildcard tests/engine tests/property)
# Tests of plain Python, which the compiler makes no difference to.
WITHOUT_KERNELS := tests/engine/nested/* tests/engine/vcpu/* tests/engine/trace/test_readers_*
WITHOUT_JIT     := -m "not jit and not soak and not bench and not image and not install and not abuse and not console and not tools and not scale" \
                   $(WITHOUT_KERNELS:%=--ignore-glob=%) $(ENGINE_TESTS)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # all targets share one environment
.PHONY: help plugin guest-demo guest-test newer-qemu demo examples serve warm test coverage soak kill-test fault-test load-test abuse-test tool-test image-test install-test console-test scale-test scale-tools mutants conformance differential lint format openapi contract contract-tools api-fuzz bench bench-compare bench-curves lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## Replay the boot of a real guest over HTTP and print the report (ARGS="--json")
	@$(BIN)/subpage demo $(ARGS)

guest-demo: $(WARMED) ## Boot a real kernel in QEMU, protect its objects by name, and watch its script tamper with two (Debian)
	@$(BIN)/python -m service.cli.guest_demo build/guest

guest-test: $(DEVELOPED) $(WARMED) ## All tests of guests in QEMU, the long ones too, and KILLS of reader, service and QEMU (Debian)
	QEMU=$(QEMU) $(BIN)/python -m pytest -m guest -p no:xdist --durations=5 tests/guest $(ARGS)
	@QEMU=$(QEMU) $(BIN)/python -m tests.guest.kill --rounds $(KILLS)

newer-qemu: ## Fetch QEMU 10 into build/qemu-10/, beside the installed one: make guest-test QEMU=build/qemu-10/qemu-system-x86_64 (Debian 12)
	@$(PYTHON) -m capture.newer_qemu build/qemu-10

examples: $(WARMED) ## Run the examples: introspection, checkpoint, device virtualization, a forgotten flush
	@for example in introspection live_introspection checkpoint device forgotten_flush; do \
	    echo "== $$example" && PYTHONPATH=. $(BIN)/python examples/$$example.py || exit 1; done

serve: $(INSTALLED) ## Serve on HOST:PORT, 127.0.0.1:8000 by default
	@exec $(BIN)/subpage serve --host $(HOST) --port $(PORT) $(ARGS)

plugin: ## Compile the QEMU plugin of `subpage record`, which it does itself otherwise (needs a C compiler)
	@$(PYTHON) -m capture.plugin

warm: $(WARMED) ## Compile all kernels now; without it that happens when the service starts

test: $(DEVELOPED) $(WARMED) ## Run all tests, then those of engine/ with the JIT off
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)
	NUMBA_DISABLE_JIT=1 $(BIN)/python -m pytest -n $(JOBS) $(WITHOUT_JIT)

# The kernels run compiled in the first run and as plain Python in the second; only there can their lines be counted.
# From Python 3.12 on, a line that was seen once costs nothing more.
coverage: export COVERAGE_CORE = $(shell $(BIN)/python -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")' 2>/dev/null)
coverage: $(DEVELOPED) $(WARMED) ## The same, measured (build/htmlcov/); both packages must reach 95 % of their lines
	@rm -rf $(COVERAGE) && mkdir -p $(COVERAGE)
	COVERAGE_FILE=$(COVERAGE)/service $(BIN)/python -m pytest -n $(JOBS) --cov=service --cov=engine --cov-report= $(ARGS)
	COVERAGE_FILE=$(COVERAGE)/engine NUMBA_DISABLE_JIT=1 \
	    $(BIN)/python -m pytest -n $(JOBS) --cov=engine --cov-report= $(WITHOUT_JIT)
	@$(BIN)/coverage combine --quiet --keep --data-file=$(COVERAGE)/all $(COVERAGE)/service $(COVERAGE)/engine
	@$(BIN)/coverage html --quiet --data-file=$(COVERAGE)/all
	$(BIN)/coverage report --data-file=$(COVERAGE)/all --include='engine/*' --fail-under=95
	$(BIN)/coverage report --data-file=$(COVERAGE)/all --include='service/*' --fail-under=95

soak: $(DEVELOPED) $(WARMED) ## OPS random operations from SEED against the naive model, each profile
	OPS=$(OPS) SEED=$(SEED) $(BIN)/python -m pytest -n 2 -m soak -o faulthandler_timeout=0 tests/property/test_history.py $(ARGS)

kill-test: $(DEVELOPED) $(WARMED) ## kill -9 the server ROUNDS times under load; nothing acknowledged may be lost (STORE=sqlite or postgres)
	@$(BIN)/python -m tests.faults.kill --rounds $(ROUNDS) --store $(STORE) $(ARGS)

fault-test: $(DEVELOPED) $(WARMED) ## Full and read-only disks, restarts of the database, stores taken away, clients of the bad kind, 10,000 idle streams
	$(BIN)/python -m pytest -m "not bench" -o faulthandler_timeout=0 tests/faults tests/service/storage/test_ownership.py $(ARGS)

load-test: $(DEVELOPED) $(WARMED) ## 4 replays of a real boot and 200 bitmap calls a second for SECONDS; the event loop's lag must stay below 50 ms
	@$(BIN)/python -m tests.load --seconds $(SECONDS) $(ARGS)

abuse-test: $(DEVELOPED) $(WARMED) ## All attacks: bombs, floods, COUNT mutated bodies, MINUTES of hostile values; figures of memory and stalls
	@$(BIN)/python -m tests.abuse --minutes $(MINUTES) --count $(COUNT) --seed $(SEED) $(ARGS)

tool-test: $(DEVELOPED) $(WARMED) ## Traces as every tool that is installed writes them, KVM in a guest's kernel among them (fetches 100 MB once)
	$(BIN)/python -m pytest -p no:xdist -m "tools or not tools" tests/guest/test_kvm_events.py tests/engine/trace/test_real_tools.py $(ARGS)

image-test: $(DEVELOPED) ## Carry out the steps of the Dockerfile in an empty folder, and run what comes of it (minutes, needs a network)
	$(BIN)/python -m pytest -m image -o faulthandler_timeout=0 tests/deploy/test_image.py $(ARGS)

install-test: $(DEVELOPED) ## Install both locks with pips of four ages, beside newer releases of what they pin (minutes, needs a network)
	$(BIN)/python -m pytest -m install -o faulthandler_timeout=0 tests/deploy/test_install.py $(ARGS)

console-test: $(DEVELOPED) $(WARMED) ## The console in Chromium: every flow, keyboard alone, axe; pictures of all screens in build/console/
	$(BIN)/python -m pytest -p no:xdist -m console --durations=5 tests/console $(ARGS)

scale-test: scale-tools $(WARMED) ## Footprints and replays by two nodes of Ray on this machine, one of them killed, and a store that speaks S3
	$(BIN)/python -m pytest -p no:xdist -m scale --durations=5 tests/scale $(ARGS)

scale-tools: $(SCALED) ## Install what `make scale-test` needs beside: Ray and a store of objects

mutants: $(DEVELOPED) ## Put faults into engine/ one at a time; the tests must notice each (ARGS="--only ID --jobs N")
	@$(BIN)/python -m tests.mutants $(ARGS)

conformance: $(DEVELOPED) $(WARMED) ## Compare the engine with Bochs, SEEDS runs of thousands of accesses (needs bochs, gcc, nasm)
	SEED=1 SEEDS=$(SEEDS) $(BIN)/python -m pytest tests/conformance -o faulthandler_timeout=0 -p no:cacheprovider $(ARGS)

differential: $(DEVELOPED) $(WARMED) ## Ask SEQUENCES random ioctl sequences from SEED of the engine and of a second model of the kernels
	@$(BIN)/python -m tests.differential --count $(SEQUENCES) --seed $(SEED) $(ARGS)

lint: $(DEVELOPED) ## ruff, formatting, mypy --strict, the arrows between the packages, and the contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@if test -x $(SPECTRAL); then echo $(SPECTRAL) lint openapi/openapi.json && \
	    $(SPECTRAL) lint --fail-severity=warn --ruleset openapi/ruleset.yaml openapi/openapi.json; \
	else echo "openapi/openapi.json is not linted: 'make contract-tools' installs Spectral, which needs npm" >&2; fi

format: $(DEVELOPED) ## Rewrite the sources as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

openapi: $(DEVELOPED) ## Regenerate openapi/openapi.json and docs/reference.md from the code
	$(BIN)/python -m service.cli.openapi --write
	$(BIN)/python -m service.cli.reference --write

contract: contract-tools $(DEVELOPED) $(WARMED) ## Lint the contract, look for breaks, generate clients and do the main job with them
	@if test -x $(SPECTRAL); then \
	    $(SPECTRAL) lint --fail-severity=warn --ruleset openapi/ruleset.yaml openapi/openapi.json; fi
	$(BIN)/python -m tests.contract.breaking $(SINCE)
	$(BIN)/python -m pytest tests/contract tests/clients $(ARGS)

# Where there is no npm, its tools are left out: what needs them says so.
contract-tools: $(CLIENTS_VENV)/.installed ## Install what `make contract` generates and lints with (npm for some of it)
	@if command -v npm >/dev/null; then $(MAKE) --no-print-directory $(CLIENTS_NODE)/.installed || \
	    echo "npm could not install $(CLIENTS)/node/package.json: Spectral and TypeScript are left out" >&2; \
	else echo "no npm here: Spectral and TypeScript are left out" >&2; fi

api-fuzz: $(DEVELOPED) $(WARMED) ## MINUTES of requests made up from the contract, at a real server (ARGS="--seed N --phases stateful")
	@$(BIN)/python -m tests.contract.fuzz --minutes $(MINUTES) $(ARGS)

bench: $(DEVELOPED) $(WARMED) ## Measure replay and single calls side by side with the alternatives
	$(BIN)/python -m bench $(ARGS)

bench-compare: $(DEVELOPED) $(WARMED) ## The same beside another revision, BASE, in turn (ARGS="--only checks calls")
	@$(BIN)/python -m bench.compare $(BASE) $(ARGS)

bench-curves: $(DEVELOPED) $(WARMED) ## How cost grows with records, pages, machines, exits, policies, vCPUs; drawn into docs/images/
	@$(BIN)/python -m bench.curves $(ARGS)

lock: ## Resolve the dependencies again into the lock files (UPGRADE=--upgrade moves all of them)
	@mkdir -p build
	$(call make_venv,build/lock-venv)
	build/lock-venv/bin/pip install --quiet 'pip-tools>=7.6,<8'
	echo 'uv>=0.13,<0.14' | $(call pip_compile,requirements-installer.lock,-)
	$(call pip_compile,requirements.lock,pyproject.toml,--all-build-deps)
	$(call pip_compile,requirements-dev.lock,pyproject.toml,--all-build-deps --extra=bench --extra=dev --extra=telemetry --constraint=requirements.lock)
	$(call pip_compile,requirements-scale.lock,pyproject.toml,--all-build-deps --extra=bench --extra=dev --extra=scale --extra=scale-test --extra=telemetry --constraint=requirements-dev.lock)
	$(call pip_compile,$(CLIENTS)/python/requirements.lock,$(CLIENTS)/python/requirements.in)
	@mkdir -p build/lock-node && cp $(CLIENTS)/node/package.json build/lock-node/
	cd build/lock-node && $(NPM) install --package-lock-only --omit-lockfile-registry-resolved
	cp build/lock-node/package-lock.json $(CLIENTS)/node/

clean: ## Remove what the tools and make have built, but for the environment in .venv/
	rm -rf build capture/build dist *.egg-info .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# ---- the environment: installed again when a lock or pyproject.toml changes, kernels compiled again when they change

# What runs. An environment that has what develops as well keeps it.
$(INSTALLED): requirements.lock requirements-installer.lock deploy/install.py pyproject.toml
	$(call make_venv,$(VENV))
	$(call install,requirements$(if $(wildcard $(DEVELOPED)),-dev,).lock)
	@touch $@

$(DEVELOPED): requirements-dev.lock $(INSTALLED)
	$(call install,$<)
	@touch $@

# All that develops, and what the tests of clusters need. When the environment is made again, so is this.
$(SCALED): requirements-scale.lock $(DEVELOPED)
	$(call install,$<)
	@touch $@

$(WARMED): $(INSTALLED) $(ENGINE_SOURCES)
	@$(BIN)/python -m engine.warm
	@touch $@

$(CLIENTS_VENV)/.installed: $(CLIENTS)/python/requirements.lock requirements-installer.lock deploy/install.py
	@mkdir -p build
	$(call make_venv,$(CLIENTS_VENV))
	@$(CLIENTS_VENV)/bin/python deploy/install.py $<
	@touch $@

$(CLIENTS_NODE)/.installed: $(CLIENTS)/node/package.json $(CLIENTS)/node/package-lock.json
	@mkdir -p $(CLIENTS_NODE) && cp $^ $(CLIENTS_NODE)/
	@cd $(CLIENTS_NODE) && $(NPM) ci
	@touch $@

# $(call make_venv,DIRECTORY): a working virtual environment there, made anew if its interpreter is gone
define make_venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
    echo "Python 3.11 or newer is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another one: make PYTHON=python3.12 ..." >&2; \
    exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
    echo "'$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; \
    exit 1; }
@$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(1)
endef

# $(call install,LOCK): the environment holds what LOCK pins, and this package as it lies here
define install
@echo "Installing into $(VENV)/ from $(1)" >&2
@$(BIN)/python deploy/install.py $(1) --editable .
endef

# $(call pip_compile,OUTPUT,SOURCE,OPTIONS): hashes of every published file, so that one lock serves all platforms, and
# extras, so that an old pip does not look these up anew
define pip_compile
CUSTOM_COMPILE_COMMAND="make lock" build/lock-venv/bin/pip-compile --quiet --generate-hashes --allow-unsafe \
    --no-strip-extras --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options \
    $(UPGRADE) $(3) --output-file=$(1) $(2)
endef
