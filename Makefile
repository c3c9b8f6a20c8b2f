# Two commands matter: `make quickstart` trains and scores a model on real speech from nothing,
# `make test` runs all tests. Both set up what they need and can be stopped and started again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RANKS ?= 2
# Two ranks share the cores; more threads than cores would wait for each other.
export OMP_NUM_THREADS ?= $(shell n=$$(nproc); echo $$((n > $(RANKS) ? n / $(RANKS) : 1)))
export DS_BUILD_OPS := 0
export DS_ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false

SETS := asr asr_synthetic language_id speaker_verification speech_qa caption
DEMO_SETS := asr_synthetic_full asr_joined language_id_full speaker_verification_full asr_other
BASE_SETS := asr game_speech asr_other no_speech speech_qa language_id speaker_verification caption asr_synthetic
EARS := whisper-tiny.en
SHARD = $(BIN)/python tools/shard_dataset.py --separate --overwrite --features speech \
  --speech-encoder assets/models/$(EARS) --workers $(RANKS)
# On a CPU glibc's malloc makes training slower all the time (docs/learning.md); without this library it has to do.
TCMALLOC := $(CURDIR)/assets/allocator/libtcmalloc_minimal.so.4
PRELOAD = LD_PRELOAD="$$(ls $(TCMALLOC) 2>/dev/null) $$LD_PRELOAD"
DEEPSPEED = $(PRELOAD) $(BIN)/deepspeed --num_gpus $(RANKS)
.PHONY: help setup models recordings allocator shards shards-base train evaluate quickstart demo try comparison report test test-tools faults fuzz ledger families lint clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/installed  ## the environment in .venv

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch, deepspeed and the rest into $(VENV) (about 7 GB, a few minutes) ..."
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[audio,demo,test]'
	@touch $@

models: setup  ## the demo LLM and speech encoder
	$(BIN)/python tools/get_demo_models.py

recordings: setup  ## recorded prompts, sound effects, synthetic speech, and their manifests
	$(BIN)/python tools/prepare/phone_prompts.py
	$(BIN)/python tools/prepare/sound_effects.py
	$(BIN)/python tools/prepare/synthetic_speech.py --sentences 1000 --recombined 2000 --workers $(RANKS)

allocator: setup  ## a malloc that stays fast
	$(BIN)/python tools/prepare/allocator.py || echo "without it training slows down by and by; going on"

shards: models recordings allocator  ## manifests to tar shards with stored encoder features
	$(SHARD) $(SETS:%=assets/manifests/%.*.jsonl) assets/shards

shards-base: EARS := whisper-base
shards-base: setup recordings allocator  ## the same and more real speech, with the frames of Whisper base (multilingual)
	$(BIN)/python tools/get_demo_models.py --models whisper-base
	$(BIN)/python tools/prepare/other_speech.py
	$(BIN)/python tools/prepare/game_speech.py
	$(BIN)/python tools/prepare/no_speech.py
	$(SHARD) $(BASE_SETS:%=assets/manifests/%.*.jsonl) assets/shards-base

train: shards  ## train configs/quickstart.yaml (goes on where it stopped)
	$(DEEPSPEED) listen_dist/train.py --config configs/quickstart.yaml

evaluate: train  ## decode and score the held-out clips
	$(DEEPSPEED) listen_dist/evaluate.py --config configs/quickstart.yaml

quickstart: evaluate  ## all of it, from nothing to a table of results
	@echo
	@echo "The run is in runs/quickstart: results.json, predictions.jsonl, metrics.jsonl, checkpoints/."
	@echo "Curves:  $(BIN)/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db"
	@echo "Next:    the README's section 'Going on'."

demo: shards  ## train configs/demo_full.yaml, longer and with more to hear, and score it
	$(BIN)/python tools/prepare/synthetic_speech.py --sentences 3600 --recombined 9000 --remixed 8000 --words 4000 --perturb \
	  --name asr_synthetic_full --workers $(RANKS)
	$(BIN)/python tools/prepare/phone_prompts.py --full
	$(BIN)/python tools/prepare/joined_prompts.py
	$(BIN)/python tools/prepare/other_speech.py
	$(SHARD) $(DEMO_SETS:%=assets/manifests/%.*.jsonl) assets/shards
	$(DEEPSPEED) listen_dist/train.py --config configs/demo_full.yaml
	$(DEEPSPEED) listen_dist/evaluate.py --config configs/demo_full.yaml
	for name in asr_other asr_synthetic_full; do \
	  $(DEEPSPEED) listen_dist/evaluate.py --config configs/demo_full.yaml eval.report=false \
	    --out runs/demo_full/$$name "data.test=[{path: assets/shards/$$name/test}]" || exit 1; done

HEARD := conf-lockednow vm-star-cancel vm-prev confbridge-removed
try: models  ## let the trained models/demo transcribe recordings that it never met: no training
	$(BIN)/python tools/prepare/phone_prompts.py
	$(BIN)/python -m listen_dist.infer --checkpoint models/demo $(HEARD:%=assets/recordings/phone_prompts/en/%.g722)

STEPS ?= 400
SEEDS ?= 0
comparison: shards  ## the pool, its rivals and ablations on the demo data, in one table (STEPS=400 SEEDS="0 1 2")
	$(PRELOAD) $(BIN)/python tools/run_comparison.py configs/rivals/*.yaml configs/ablations/*.yaml train.max_steps=$(STEPS) \
	  --ranks $(RANKS) --seeds $(SEEDS) --top-k 1 2 8

report:  ## open the pool of runs/quickstart (or RUN=…) again: report/report.html in the run folder
	$(BIN)/python -m listen_dist.evaluation.report --run $(or $(RUN),runs/quickstart)

test: models recordings lint test-tools  ## lint, types, layers and all tests
	$(BIN)/python -m pytest tests -q

# Several at once may wait for each other's lock; whatever goes wrong, the tests say what is missing and skip.
APT = DEBIAN_FRONTEND=noninteractive timeout 240 apt-get -qq -y -o DPkg::Lock::Timeout=60 install --no-install-recommends
test-tools:  ## Debian's Slurm and Chromium for their tests, where apt-get and root are there
	@if command -v apt-get >/dev/null && test "$$(id -u)" = 0; then \
	  if ! command -v slurmd >/dev/null || ! command -v chromium-headless-shell >/dev/null; then \
	    echo "installing Slurm and Chromium for the tests ..."; timeout 120 apt-get -qq update; fi; \
	  command -v slurmd >/dev/null || \
	    $(APT) slurmctld slurmd slurm-client munge shellcheck iproute2 >/dev/null; \
	  command -v chromium-headless-shell >/dev/null || $(APT) chromium-headless-shell >/dev/null; fi || true

faults: setup  ## kill a small run at 20 random moments and compare it with an unbroken one
	$(BIN)/python -m tests.distributed.fault_campaign

MINUTES ?= 60
SEED ?= 0
fuzz: setup  ## generated and damaged inputs for MINUTES=60, of SEED=0: what is neither used nor refused in a line is a fault
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) --seed $(SEED)

ledger: setup  ## 20 kills over changing ranks and workers: every sample counts exactly once (minutes)
	LEDGER_KILLS=20 $(BIN)/python -m pytest -q -s tests/distributed/test_ledger.py

families: setup  ## every family of LLMs that transformers has: right alone and on two ranks, or refused? (an hour)
	$(BIN)/python -m tests.families

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy listen_dist
	$(BIN)/lint-imports --config setup.cfg

clean:  ## remove runs and shards; keep models, recordings and the environment
	rm -rf runs assets/shards assets/shards-base
