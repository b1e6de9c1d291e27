# Two commands do everything: `make demo` and `make test`. Each sets up what it needs.
SHELL := /bin/sh
PYTHON := .venv/bin/python
NEWEST := .venv-newest/bin/python

.PHONY: install demo test test-newest test-page fault load check bench gpu gpu-wheels gpu-offline gpu-bench gpu-test \
	image image-test synth lock clean

install: .venv/installed

.venv/installed: requirements/pinned.txt pyproject.toml
	python=$$(requirements/find-python 3.9 3.10 3.11 3.12 3.13) && "$$python" -m venv .venv
	$(PYTHON) -m pip install --quiet --requirement requirements/pinned.txt
	$(PYTHON) -m pip install --quiet --no-deps --editable .
	touch $@

.venv-newest/installed: requirements/newest.txt pyproject.toml
	python=$$(requirements/find-python 3.11) && "$$python" -m venv .venv-newest
	$(NEWEST) -m pip install --quiet --requirement requirements/newest.txt
	$(NEWEST) -m pip install --quiet --no-deps --editable .
	touch $@

demo: install
	.venv/bin/vton demo

test: install
	$(PYTHON) -m pytest -m "not gpu and not browser"

test-newest: .venv-newest/installed
	$(NEWEST) -m pytest -m "not gpu and not browser"

# Whoever is not root installs a Chromium before, or names one in VTON_TEST_BROWSER.
test-page: install
	test -n "$$VTON_TEST_BROWSER" || command -v chromium >/dev/null || test "$$(id -u)" != 0 || \
		{ apt-get update -qq && apt-get install -y --no-install-recommends chromium; }
	$(PYTHON) -m pytest -m browser

fault: install
	$(PYTHON) -m tests.faults

load: install
	$(PYTHON) -m bench.load

check: install
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -q tests/test_architecture.py

bench: install
	$(PYTHON) -m bench.pipeline --config tiny --device cpu

# The measurement comes first, and the tests come whatever became of it. GPU_JSON names a file for the report.
GPU_STEPS := gpu-bench gpu-test
gpu: install
	$(MAKE) --keep-going --jobs=1 $(GPU_STEPS)

# For a machine without network, whose python3 (of GPU_PYTHON, on x86_64) has torch, accelerate, transformers, click,
# httpx, opencv-python-headless, pillow, pytest, pytest-timeout and requests, and what these bring: numpy among it.
GPU_PYTHON := 3.12
GPU_WHEELS := annotated-types diffusers pydantic pydantic-core typing-extensions typing-inspection
gpu-wheels: install
	rm -rf .wheels
	$(PYTHON) -m pip download --quiet --dest .wheels --constraint requirements/newest.txt --no-deps \
		--only-binary=:all: --implementation cp --python-version $(GPU_PYTHON) --platform manylinux_2_28_x86_64 \
		--platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 $(GPU_WHEELS)

# There, beside .wheels. Wants no more than python3, and installs nothing outside of this folder.
gpu-offline:
	python3 -m pip install --quiet --no-index --no-deps --upgrade --target .wheels/site .wheels/*.whl
	PYTHONPATH=$(CURDIR)/.wheels/site $(MAKE) --keep-going --jobs=1 PYTHON=python3 $(GPU_STEPS)

# The two steps of both; `make gpu GPU_STEPS=gpu-test` takes one of them.
gpu-bench:
	$(PYTHON) -m bench.pipeline --compare --compile --config sd15 --device cuda --limit-s 180 --record $(GPU_JSON:%=--json %)

gpu-test:  # other versions than those of the lists may warn; what conftest.py prepares takes the whole service
	$(PYTHON) -m pytest -m gpu --noconftest --override-ini filterwarnings=default $$(grep -l pytest.mark.gpu tests/*.py)

image:
	docker build --target sagemaker --tag vton-endpoint .

# Needs root, and no engine. IMAGE_TEST_DIR names a folder that is kept for the next time.
image-test: install .venv-lock/bin/uv
	tests/image/run.sh $(IMAGE_TEST_DIR)

# Values come from deploy/cdk.json, or from CDK_CONTEXT_JSON. jsii tells of Node 20's end at each start.
synth: install
	JSII_SILENCE_WARNING_END_OF_LIFE_NODE_VERSION=20 $(PYTHON) -m deploy.app

lock: .venv-lock/bin/uv
	requirements/lock.sh $<

.venv-lock/bin/uv:
	python=$$(requirements/find-python 3.11 3.12 3.13 3.10 3.9) && "$$python" -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet uv

clean:
	rm -rf .venv .venv-newest .venv-lock .wheels vton_output cdk.out *.egg-info
