# `make` alone prints the documented targets.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTO_BIN := .venv-proto/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test test-fast test-slow coverage e2e-compose upgrade-fixture bench-evaluation bench-selection \
  bench-attacks bench-privacy bench-secure bench-training bench-transport lint format proto proto-check docs wheel wheelhouse images clean

help:  ## print this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# pip must not let a newer torch in: an unpinned one brings gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[server,client,dev]'
	@touch $@

setup: $(STAMP)  ## install everything into .venv

demo: $(STAMP)  ## run a whole federation on this machine (MODEL=, STRATEGY=, ROUNDS=, SECURE=1)
	$(BIN)/python demo/run.py $(if $(MODEL),--model '$(MODEL)') $(if $(STRATEGY),--strategy '$(STRATEGY)') $(if $(ROUNDS),--rounds '$(ROUNDS)') $(if $(SECURE),--secure)

# One thread each: the tests run in as many processes as there are cores, and so do those that they start.
# Python keeps what it compiles, whatever the caller says: each process would compile all of tests and fedhds again.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal
test: $(STAMP)  ## run the tests but for the long ones
	$(PYTEST)
	@echo "The long tests (make test-slow) last passed: $$(cat tests/long-tests.txt)"

test-fast: $(STAMP)  ## run those of the tests that start no process of fedhds and are not slow
	$(PYTEST) -m 'not e2e and not slow and not compose and not long'

test-slow: $(STAMP)  ## run the long tests, which `make test` leaves out, and note when they passed
	$(PYTEST) -m long
	@echo "$$(date -u +%F) at $$(git describe --always --dirty --exclude '*'), $$(nproc) cores, $$(uname -m)" \
	  | tee tests/long-tests.txt

# No part of `make test`: counting branches makes Python much slower. Programs are measured too, until a test kills them.
coverage: $(STAMP)  ## run the tests and print which branches of the three packages they take
	$(BIN)/coverage erase
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -q -n auto --dist worksteal
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

e2e-compose: $(STAMP) images  ## test deploy/compose with real containers (a quarter of an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m compose tests/compose

upgrade-fixture: $(STAMP)  ## pack a run that the version of TAG= (or TAG=worktree) leaves behind, for the tests of upgrades
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.support.earlier '$(TAG)'

bench-selection: $(STAMP)  ## measure what the strategies pick and what selecting costs (DATA=, MODEL=)
	@test -n '$(DATA)' && test -n '$(MODEL)' \
	  || { echo 'bench-selection needs DATA= (Dolly-15k: a file or its folder) and MODEL= (hub id or path)'; exit 2; }
	$(BIN)/python -m benchmarks.selection --data '$(DATA)' --model '$(MODEL)'

bench-training: $(STAMP)  ## measure training beside trl and transformers' Trainer (DATA=, MODELS=, BENCH_FLAGS=)
	@test -n '$(DATA)' && test -n '$(MODELS)' \
	  || { echo 'bench-training needs DATA= (Dolly-15k: a file) and MODELS= (hub ids or paths)'; exit 2; }
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[client,bench]'
	$(BIN)/python -m benchmarks.training --data '$(DATA)' --model $(MODELS) $(BENCH_FLAGS)

bench-evaluation: $(STAMP)  ## measure rows a second of evaluation, in batches and one at a time (DATA=, MODELS=)
	@test -n '$(DATA)' -a -n '$(MODELS)' \
	  || { echo 'bench-evaluation needs DATA= (a file of rows) and MODELS= (hub ids or paths)'; exit 2; }
	$(BIN)/python -m benchmarks.evaluation --data '$(DATA)' --model $(MODELS)

bench-secure: $(STAMP)  ## measure a round under secure aggregation beside one in the clear, on this machine
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.secure

bench-privacy: $(STAMP)  ## measure unseen loss and Rouge-L against epsilon of DP-SGD (DATA=, MODEL=)
	@test -n '$(DATA)' && test -n '$(MODEL)' \
	  || { echo 'bench-privacy needs DATA= (a file of rows) and MODEL= (hub id or path)'; exit 2; }
	$(BIN)/python -m benchmarks.privacy --data '$(DATA)' --model '$(MODEL)'

bench-attacks: $(STAMP)  ## measure what hostile sites do to the demo's model under each rule (BENCH_FLAGS=)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.attacks $(BENCH_FLAGS)

bench-transport: $(STAMP)  ## measure rounds, idle sites and their cost beside plain gRPC, on Linux
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.transport

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The generator is pinned low, in a venv of its own: it sets the lowest protobuf and grpcio that can run the stubs.
.venv-proto/.installed: Makefile
	$(PYTHON) -m venv .venv-proto
	$(PROTO_BIN)/pip install --quiet --disable-pip-version-check grpcio-tools==1.76.0 mypy-protobuf==5.1.0 'setuptools<81'
	@touch $@

proto: .venv-proto/.installed  ## regenerate common/fedhds/v2 from proto/
	PATH="$(CURDIR)/$(PROTO_BIN):$$PATH" $(PROTO_BIN)/python -m grpc_tools.protoc -I proto --python_out=common \
	  --grpc_python_out=common --mypy_out=quiet:common $$(find proto -name '*.proto' | sort)

proto-check: proto  ## fail when the committed stubs are not what proto/ gives
	@git diff --exit-code --stat -- common/fedhds/v2 && test -z "$$(git status --porcelain -- common/fedhds/v2)" \
	  || { echo 'proto-check: common/fedhds/v2 is out of date; run `make proto` and commit'; exit 1; }

docs: $(STAMP)  ## regenerate the references of settings and metrics
	$(BIN)/python docs/generate.py

wheel: $(STAMP)  ## build the wheel into dist/
	$(BIN)/python -m build --wheel --outdir dist

# What images are built from without internet; the image builds fedhds itself, with hatchling.
wheelhouse: $(STAMP)  ## collect wheels for images into deploy/wheelhouse (TORCH=cpu, cu128, ...)
	$(BIN)/pip wheel --wheel-dir deploy/wheelhouse -c constraints.txt \
	  --extra-index-url https://download.pytorch.org/whl/$(or $(TORCH),cpu) '.[server,client,postgres,s3]' hatchling
	rm deploy/wheelhouse/fedhds-*.whl

images:  ## build the images fedhds-server and fedhds-client (TORCH=, EXTRAS=, PIP_NO_INDEX=1)
	DOCKER_BUILDKIT=1 docker build -f deploy/Dockerfile --target server -t fedhds-server $(IMAGE_ARGS) .
	DOCKER_BUILDKIT=1 docker build -f deploy/Dockerfile --target client -t fedhds-client $(IMAGE_ARGS) .
IMAGE_ARGS = $(foreach name,TORCH EXTRAS PIP_NO_INDEX,$(if $($(name)),--build-arg $(name)=$($(name))))

clean:  ## remove environments, caches and demo runs
	rm -rf $(VENV) .venv-proto build dist demo/output .mypy_cache .pytest_cache .ruff_cache
