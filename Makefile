# Two commands do everything: `make demo` and `make test`. Each sets up what it needs.
SHELL := /bin/sh
PYTHON := .venv/bin/python
NEWEST := .venv-newest/bin/python

.PHONY: install demo test test-newest test-page fault load check bench gpu image image-test synth lock clean

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

# The measurement comes first, and the tests come whatever became of it.
gpu: install
	status=0; \
	$(PYTHON) -m bench.pipeline --compare --compile --config sd15 --device cuda --record || status=1; \
	$(PYTHON) -m pytest -m gpu || status=1; \
	exit $$status

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
	rm -rf .venv .venv-newest .venv-lock vton_output cdk.out *.egg-info
