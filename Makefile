# One vocabulary for people and CI: `make help` prints it. Logic lives in xtask; a recipe only says what runs.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

export CARGO_TARGET_DIR ?= $(HOME)/.cache/reliant/target
export RELIANT_CACHE ?= $(HOME)/.cache/reliant/tools
# Passed on by `up`, `demo` and `test`.
export ARGS ?=

BIN := $(CARGO_TARGET_DIR)/debug
RELEASE := $(CARGO_TARGET_DIR)/release
WEB := services/web
BROWSER := tests/browser

.PHONY: help up demo test test-hostile test-idle test-observability test-phoenix test-fresh chaos bench compare lint fmt web web-test proto tools test-tools doctor deny sqlx program build clean need-cargo need-npm

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-19s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

up: ## Install what is missing, build, start everything here, print where to go (Ctrl-C stops it; ARGS="--reset" starts anew)
	@$(MAKE) -j2 tools program
	@exec $(BIN)/reliant up $(ARGS)

demo: ## The whole way once without a terminal; fails if anything is off (ARGS="your own message")
	@$(MAKE) -j2 tools program
	@if [ -n "$$ARGS" ]; then exec $(BIN)/reliant demo -- "$$ARGS"; else exec $(BIN)/reliant demo; fi

test: ## Everything that is checked, over real servers, processes and a browser (ARGS="a test's name" runs only those)
	@$(MAKE) -j2 test-tools lint
	@$(BIN)/xtask sqlx --check
	@$(BIN)/xtask test $(ARGS)

test-fresh: ## `make demo` and `make up` as on a machine with nothing, Postgres hidden (10 minutes)
	@python3 tests/fresh/fresh.py

chaos: web tools ## Kill, cut, pause and slow everything for 40 minutes, beside greedy neighbours, in release; nothing may be lost or stand still (ARGS="--seed 7 --minutes 12"); JSON to $CHAOS_OUT, else tests/chaos/results
	@[ -x $(RELEASE)/reliant-chaos ] || echo "building in release; from nothing this takes some ten minutes on two cores"
	@cargo build --release -p reliant-cli -p reliant-chaos
	@exec $(RELEASE)/reliant-chaos $(ARGS)

test-observability: ## Traces, phases, logs and metrics of a real mesh, with many kills; prints each trace (part of `make test`, with few)
	@$(MAKE) -j2 test-tools build
	@SHOW_TRACES=1 RELIANT_TEST_KILLS=40 $(BIN)/xtask test --test e2e observability -- --nocapture --test-threads=2

test-hostile: ## What a hostile client, daemon, repository or server was found to do: one line each, closed or open (exits 1 while one is open)
	@$(MAKE) -j2 test-tools build
	@$(BIN)/xtask hostile

test-idle: ## A mesh that nobody uses stays quiet, for an hour (IDLE_MINUTES=10), and answers at once behind it (part of `make test`, a minute)
	@$(MAKE) -j2 test-tools build
	@RELIANT_TEST_IDLE_MINUTES="$${IDLE_MINUTES:-60}" $(BIN)/xtask test --test e2e a_healthy_idle_mesh_is_quiet -- --nocapture

test-phoenix: program tools ## Our spans in a trace store that is not ours, found by its API (installs arize-phoenix on first use, 830 MB)
	@python3 xtask/provision/provision.py phoenix
	@$(RELIANT_CACHE)/phoenix/bin/python tests/foreign/phoenix.py $(BIN)/reliant

bench: web tools ## Measure it, in release; JSON to $BENCH_OUT (ARGS=--strict fails where a goal is missed; ARGS=growth,overload measures these parts alone)
	@[ -x $(RELEASE)/reliant-bench ] || echo "building in release; from nothing this takes about ten minutes on two cores"
	@cargo build --release -p reliant-cli -p reliant-bench
	@$(RELEASE)/reliant-bench $(ARGS)

compare: tools need-cargo need-npm ## Measure two commits by turns and tell how they differ: A=HEAD~1 B=HEAD [PARTS="turns trips"] [ROUNDS=24]; JSON to $COMPARE_OUT
	@cargo build --quiet -p xtask
	@$(BIN)/xtask compare --a "$(A)" --b "$(B)" --parts "$(PARTS)" --rounds "$(ROUNDS)"

lint: web-test proto ## Formatting, clippy, page, protobuf, import directions, paths named in docs
	@cargo fmt --all --check || { echo "error: the code is not formatted; run \`make fmt\`"; exit 1; }
	@cargo clippy --workspace --all-targets --quiet -- -D warnings
	@$(MAKE) build
	@$(BIN)/xtask check

fmt: need-cargo ## Format the Rust code
	@cargo fmt --all

web: $(WEB)/dist/main.js ## Build the page into services/web/dist

web-test: web $(BROWSER)/node_modules/.package-lock.json ## Type-check and test the page
	@cd $(WEB) && npm run --silent check && npm run --silent test

proto: $(WEB)/node_modules/.package-lock.json ## buf lint
	@cd $(WEB) && npm run --silent lint:proto

tools: ## Install the servers this machine lacks: Temporal, NATS, Postgres, an MCP server
	@command -v python3 >/dev/null || { echo "error: python3 was not found; install Python 3.10 or later and run it again" >&2; exit 1; }
	@python3 xtask/provision/provision.py servers

test-tools: ## Install what the tests need beside them: Chromium, MCP servers, a foreign gRPC client
	@command -v python3 >/dev/null || { echo "error: python3 was not found; install Python 3.10 or later and run it again" >&2; exit 1; }
	@python3 xtask/provision/provision.py servers tests

doctor: program ## Say what is reachable, what is wrong, and what to do
	@$(BIN)/reliant doctor

sqlx: tools need-cargo ## Write .sqlx anew from the queries and the migrations
	@cargo build --quiet -p xtask
	@$(BIN)/xtask sqlx

deny: need-cargo ## Licences, sources and banned crates (installs cargo-deny on first use, some minutes)
	@cargo deny --version >/dev/null 2>&1 || cargo install --locked cargo-deny
	@cargo deny check bans licenses sources

clean: ## Remove what was built; installed tools and data stay
	@rm -rf $(WEB)/dist $(WEB)/gen $(WEB)/.test $(WEB)/node_modules $(BROWSER)/node_modules
	@cargo clean --quiet

# ---- parts

# What `make up` runs, and nothing else.
program: web need-cargo
	@[ -x $(BIN)/reliant ] || echo "building; from nothing this takes about four minutes on two cores"
	@cargo build -p reliant-cli

build: web need-cargo
	@cargo build --workspace

need-cargo:
	@command -v cargo >/dev/null || { echo "error: cargo was not found; install Rust (https://rustup.rs) and run it again" >&2; exit 1; }

need-npm:
	@command -v npm >/dev/null || { echo "error: npm was not found; install Node.js 20 or later (https://nodejs.org) and run it again" >&2; exit 1; }

%/node_modules/.package-lock.json: %/package.json %/package-lock.json | need-npm
	@echo "installing the packages of $* from npm"
	@cd $* && npm ci --ignore-scripts --no-audit --no-fund --silent || { echo "error: npm could not install the packages of $*; check the network and run it again" >&2; exit 1; }
	@touch $@

$(WEB)/dist/main.js: $(WEB)/node_modules/.package-lock.json $(wildcard $(WEB)/src/*.ts $(WEB)/static/* proto/reliant/v1/*.proto) $(WEB)/build.mjs $(WEB)/buf.gen.yaml buf.yaml
	@cd $(WEB) && npm run --silent generate && npm run --silent build
	@touch $@
