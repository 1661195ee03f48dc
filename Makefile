# make demo   a small GPT trained, split and sampled on 2 ranks, offline
# make test   the tests, in two processes; make check adds lint and types
# make docs   the walk-through: its commands run again, its quotations and figures rewritten
PYTHON ?= python3
BIN = .venv/bin
NPROC ?= 2
RANKS = OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --local_addr=127.0.0.1 --nproc_per_node=$(NPROC)

.PHONY: demo test docs check lint types clean

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: .venv/ready
	$(BIN)/python data/python_docs/prepare.py
	$(RANKS) train_tp.py configs/demo.py --overwrite=True
	$(BIN)/python shard_checkpoint.py split --init_from=out/demo --tp=$(NPROC) --out=out/demo-shards --force
	$(RANKS) sample_tp.py --init_from=out/demo-shards --prompt="The " --max_new_tokens=300 --temperature=0.5 --seed=7 --report=out/demo-report.json

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

docs: .venv/ready
	$(BIN)/python docs/quote.py docs/tensor_parallelism.md

lint: .venv/ready
	$(BIN)/ruff check .

types: .venv/ready
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf .venv out
