# Every verb does its own set-up: `make serve` and `make test` are enough on a fresh clone.
PYTHON ?= python3
MODEL ?= email-triage
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ORACLE := .oracle
TRAINER := $(VENV)/.finetune
DESKSIDE := $(BIN)/deskside
PORT ?= 8080
MINUTES ?= 30
# See runtime/cli/main.py: llama.cpp's threads give a busy core back instead of spinning on it.
export GOMP_SPINCOUNT ?= 1000
# Of llama.cpp only the engine: not its image reader, nor what its wheel holds a second and a third time.
COMPILE := CMAKE_ARGS='-DLLAVA_BUILD=OFF $(CMAKE_ARGS)' \
	SKBUILD_WHEEL_EXCLUDE='/lib/**;/include/**;/bin/**;/llama_cpp/lib/*.so.*.*'
# What it is compiled with on this processor; the header says why.
ifeq ($(shell uname -m),x86_64)
COMPILE += CFLAGS='$(CFLAGS) -include "$(CURDIR)/runtime/llama/amx.h"' \
	CXXFLAGS='$(CXXFLAGS) -include "$(CURDIR)/runtime/llama/amx.h"'
endif
INSTALL := $(COMPILE) $(PYTHON) -P runtime/cli/install.py $(VENV)

.DEFAULT_GOAL := help
.PHONY: help setup model serve chat convert finetune batch bench bench-peers bench-convert soak test oracle check fix rebuild \
	lock lock-finetune lock-peers lock-oracle clean

help: ## Show these verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { \
		line = sprintf("  make %-13s", $$1); n = split($$2, words, " "); \
		for (i = 1; i <= n; i++) { \
			if (length(line) + 1 + length(words[i]) > 80) { print line; line = sprintf("%20s", "") } \
			line = line " " words[i] } \
		print line }' $(MAKEFILE_LIST)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Deskside needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || \
		{ echo "Deskside compiles llama.cpp and found no C++ compiler. Debian/Ubuntu: apt-get install g++; macOS: xcode-select --install" >&2; exit 1; }
	@$(INSTALL)
	@touch $@

setup: $(READY) ## Make .venv, install from the lock file, build the default model
	@$(DESKSIDE) pull gemma-3-270m >/dev/null
	@$(DESKSIDE) pull email-triage >/dev/null

model: $(READY)
	@for name in $(MODEL); do case $$name in */*) ;; *) $(DESKSIDE) pull $${name%%:*} >/dev/null || exit ;; esac; done

serve: model ## Serve MODEL (email-triage; or several, "a b") on 127.0.0.1:PORT (8080)
	@exec $(DESKSIDE) serve $(MODEL) --port $(PORT)

chat: model ## Talk to MODEL in the terminal
	@exec $(DESKSIDE) chat $(MODEL)

convert: $(READY) ## Convert SOURCE [ADAPTER=dir] [QUANT=Q8_0] into a model called NAME
	@test -n "$(SOURCE)" -a -n "$(NAME)" || { echo "usage: make convert SOURCE=path-or-name NAME=name [ADAPTER=dir] [QUANT=Q8_0]" >&2; exit 2; }
	@$(DESKSIDE) convert $(SOURCE) --name $(NAME) $(if $(ADAPTER),--adapter $(ADAPTER)) $(if $(QUANT),--quant $(QUANT))

$(TRAINER): $(READY) convert/finetune/requirements.lock
	@echo "==> Installing JAX, which trains: 125 MB to download, 0.5 GB on disk, no CUDA" >&2
	@$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r convert/finetune/requirements.lock
	@touch $@

finetune: $(TRAINER) ## Train your own model on FILE=mails.csv [NAME=mails]; ARGS are passed on
	@test -n "$(FILE)" || { echo "usage: make finetune FILE=mails.csv [NAME=mails] [ARGS='--minutes 20']" >&2; exit 2; }
	@case '$(ARGS)' in *--base*) ;; *) $(DESKSIDE) pull gemma-3-270m >/dev/null ;; esac
	@$(DESKSIDE) finetune $(FILE) $(if $(NAME),--name $(NAME)) $(ARGS)

batch: model ## Run the requests in IN=file.jsonl through MODEL, answers to OUT=file.jsonl
	@test -n "$(IN)" -a -n "$(OUT)" || { echo "usage: make batch IN=requests.jsonl OUT=answers.jsonl [MODEL=name]" >&2; exit 2; }
	@$(DESKSIDE) batch $(IN) $(OUT) --model $(MODEL)

bench: setup ## Measure the fine-tune against the base and a hosted prompt; ARGS are passed on
	@$(DESKSIDE) bench $(ARGS)

bench-peers: setup ## Measure Deskside beside llama-server, llama_cpp.server, CTranslate2 and ik_llama.cpp, in a venv of their own
	@$(DESKSIDE) bench peers $(ARGS)

soak: setup ## Load a server at twice its capacity for MINUTES (30), killing its engine on the way, and check it
	@$(DESKSIDE) bench soak --minutes $(MINUTES) $(ARGS)

$(ORACLE)/.ready: $(READY) tests/oracle/install.py tests/oracle/requirements.lock tests/oracle/torch.txt
	@$(BIN)/python tests/oracle/install.py $(ORACLE)

oracle: $(ORACLE)/.ready ## Compare conversions with transformers and llama.cpp's own converter, in a venv of their own
	@$(BIN)/pytest -q -m oracle $(ARGS)

bench-convert: setup $(ORACLE)/.ready ## Measure conversion beside llama.cpp's own converter
	@$(DESKSIDE) bench convert $(ARGS)

test: setup $(TRAINER) ## Run every test, those on the real model included; ARGS are passed on (-n 0: in one process)
	@$(BIN)/pytest -q -n auto --maxprocesses 4 $(ARGS)

check: $(READY) ## Lint, formatting, spelling, types, layout and prose
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/codespell
	@$(BIN)/mypy
	@$(BIN)/pytest -q tests/test_layout.py tests/test_architecture.py tests/test_prose.py

fix: $(READY) ## Mend what ruff can mend by itself
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

rebuild: $(READY) ## Compile llama.cpp anew; for a GPU: CMAKE_ARGS="-DGGML_CUDA=on" make rebuild
	@$(INSTALL) --rebuild

lock: ## Resolve requirements.lock anew from pyproject.toml (needs uv)
	@uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--extra dev --extra bench --extra default-model --extra tables --upgrade -q -o requirements.lock

lock-finetune: ## Resolve convert/finetune/requirements.lock anew from pyproject.toml (needs uv)
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["finetune"])' | \
		uv pip compile - -c requirements.lock --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--upgrade -q -o convert/finetune/requirements.lock

lock-peers: ## Resolve benchmarks/peers.lock anew from peers.in (needs uv)
	@uv pip compile benchmarks/peers.in --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--upgrade -q -o benchmarks/peers.lock

lock-oracle: ## Resolve tests/oracle/requirements.lock anew from requirements.in (needs uv)
	@mkdir -p $(ORACLE)
	@echo 'torch ; sys_platform == "none"' >$(ORACLE)/without-torch.txt
	@uv pip compile tests/oracle/requirements.in --override $(ORACLE)/without-torch.txt --no-emit-package torch \
		--universal --python-version 3.11 --generate-hashes --no-header --no-annotate --upgrade -q -o tests/oracle/requirements.lock

clean: ## Remove .venv, the peers and caches; installed models stay (deskside models remove NAME)
	@rm -rf $(VENV) $(ORACLE) .bench-peers .bench-convert .bench-trim .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
