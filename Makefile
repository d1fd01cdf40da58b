# Two commands for a newcomer: `make demo` and `make test`. Both install what is missing, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint types check bench-end-to-end bench-input bench-flow bench-apex bench-head-motion bench-predict bench-scale gpu-check lock clean
.DEFAULT_GOAL := help

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | column -t -s ':'

# the lock file's content decides, not its time stamp: a fresh clone on a prepared machine installs nothing again
$(READY): requirements.lock setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "htnet needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# deepspeed is published as source: it is built here, without a compiler, by the pinned setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep -E '^(setuptools|wheel)==' requirements.lock)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

demo: $(READY) ## synthetic faces -> store -> LOSO sweep -> report, on this machine
	$(BIN)/htnet synth demo/raw --subjects 3 --clips 6 --difficulty realistic
	$(BIN)/htnet prepare configs/demo.yaml
	$(BIN)/htnet sweep configs/demo.yaml --out demo/run

# in the order of tests/conftest.py, which has the long files first
test: $(READY) ## every test that runs without a GPU, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(READY) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## mypy, strict
	$(BIN)/mypy

check: lint types test ## all that has to pass before a commit

bench-end-to-end: $(READY) ## fold training at the paper's size against upstream's way
	$(BIN)/htnet profile end-to-end --out docs/benchmarks/results

bench-input: $(READY) ## the training stream against a DataLoader with OpenCV
	$(BIN)/htnet profile input --train-step --out docs/benchmarks/results

bench-flow: $(READY) ## TV-L1 flow against scikit-image's and OpenCV's
	$(BIN)/htnet profile flow --out docs/benchmarks/results

bench-apex: $(READY) ## finding apexes by flow and by grey differences
	$(BIN)/htnet profile apex --out docs/benchmarks/results

bench-head-motion: $(READY) ## scores with and without the head's motion in the flow
	$(BIN)/htnet profile head-motion --out docs/benchmarks/results

bench-predict: $(READY) ## a thousand pairs beside the floor of their parts, and the start of the program
	$(BIN)/htnet profile predict --out docs/benchmarks/results

bench-scale: $(READY) ## training by two processes: steps, memory, snapshots, a killed worker
	$(BIN)/htnet profile scale --out docs/benchmarks/results

# what is installed decides what runs; nothing is installed for it, so that any machine with torch and a GPU will do
gpu-check: ## all that needs a GPU, or STEPS=fold,tests of it; under nine minutes, results in runs/gpu-check
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) kernels/benchmarks/gpu_check.py $(if $(STEPS),--steps $(STEPS))

lock: $(READY) ## write the installed versions to requirements.lock
	{ sed -n '1,2p' requirements.lock; $(BIN)/python -m pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+cpu//'; } > requirements.new
	mv requirements.new requirements.lock

clean: ## remove the demo and the environment
	rm -rf demo $(VENV)
