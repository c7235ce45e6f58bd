# setup  make .venv with everything pinned     check  lint, types, known vulnerabilities
# smoke  the whole job on a CPU, in minutes    test   the default tests; test-all: the long ones too
# image  build the container image              gpu-check  ten minutes on one GPU; on a CPU the same code, tiny
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
IMAGE ?= finetune-job:$(VERSION)
BUILDER ?= $(firstword $(foreach tool,docker podman buildah,$(shell command -v $(tool) >/dev/null 2>&1 && echo $(tool))))

SIDE_BY_SIDE ?= -n 2 --maxschedchunk 1

.PHONY: setup check test test-all smoke image gpu-check
.DELETE_ON_ERROR:

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python .ci/audit.py

test: setup
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow"

test-all: setup
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

# Each of the three lines does nothing that is done already.
smoke: setup
	@$(BIN)/python smoke/fetch.py .smoke
	@$(BIN)/python entrypoint.py run configs/smoke.yaml
	@TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 $(BIN)/python smoke/show.py .smoke

# On a machine without network access: PYTHONPATH=SITE python benchmarks/gpu_check.py (see benchmarks/gpu_wheels.sh).
gpu-check: setup
	$(BIN)/python benchmarks/gpu_check.py $(GPU_CHECK_OPTIONS)

# BASE_IMAGE is the base of one's own; BUILD_OPTIONS go to the builder as they are. A revision with changes that are not
# committed is called dirty, and credentials in git's URL stay there. In the OCI format there is no health check.
image: REVISION = $(shell git rev-parse HEAD 2>/dev/null)$(shell test -z "$$(git status --porcelain 2>/dev/null)" || echo -dirty)
image: SOURCE = $(shell git remote get-url origin 2>/dev/null | sed -n 's|//[^/@]*@|//|; /:/p')
image:
	$(if $(BUILDER),,$(error no docker, podman or buildah found))
	$(BUILDER) build $(if $(filter podman buildah,$(notdir $(BUILDER))),--format docker) --tag $(IMAGE) \
	  --label org.opencontainers.image.version=$(VERSION) --label org.opencontainers.image.revision=$(REVISION) \
	  --label org.opencontainers.image.source=$(SOURCE) \
	  $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) $(BUILD_OPTIONS) .
