"""Imports point down, and each third-party package is imported where the architecture puts it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
LEVEL_OF = {
    "container.errors": 0,
    "container.strict_json": 1,
    "container.addresses": 0,
    "model.interface": 0,
    "model.geometry": 0,
    "model.training_options": 0,
    "container.request": 1,
    "container.settings": 1,
    "container.telemetry": 1,
    "container.colours": 1,
    "container.images": 2,
    "container.fetch": 2,
    "container.sandbox": 3,
    "container.decoder": 4,
    "container.storage": 3,  # it names files as `images` does
    "container.notify": 4,  # its message is of a stored object
    "model": 4,
    "container.sharing": 1,
    "container.worker": 5,
    "container.person_masks": 6,
    "container.get_vton": 7,
    "container.get_masks": 7,
    "container.wiring": 8,
    "container.form": 3,
    "container.openapi": 4,
    "container.gate": 2,
    "container.vton_api": 9,
    "container.multipart": 4,
    "container.rest_api": 10,
    "container.runpod_job": 9,
    "container.runpod_handler": 10,
    "container.page_api": 11,
    "container.connections": 0,
    "container.server": 12,
    "container.weights_push": 5,
    "container.weights_cli": 10,
    "container.train_cli": 10,
    "container.serve_cli": 13,
    "container.page_cli": 13,
    "container.training_job": 10,
    "container.cli_files": 3,
    "container.cli": 14,
    "deploy": 10,
}
ONLY_UNDER = {
    "torch": ("model",),
    "diffusers": ("model",),
    "transformers": ("model",),
    "accelerate": ("model",),
    "aws_cdk": ("deploy",),
    "cdk_nag": ("deploy",),
    "constructs": ("deploy",),
    "boto3": ("container.wiring", "container.weights_push", "deploy"),
    "fastapi": (
        *("container.vton_api", "container.multipart", "container.rest_api", "container.page_api", "container.server"),
        "deploy",
    ),
    "limits": ("container.gate",),
    "runpod": ("container.runpod_handler",),
    "uvicorn": ("container.connections", "container.server", "deploy"),
    "threading": ("container.worker", "container.sharing", "container.decoder", "container.server", "deploy"),
}
FORBIDDEN = {"pickle", "marshal", "shelve", "joblib"}
UNPICKLES = "model.weights"
CONVERTS = "model.maskers.conversion"  # published weights, once, with a list of what they may name


def modules():
    for folder in ("container", "model", "deploy"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def level(name):
    while name and name not in LEVEL_OF:
        name = name.rpartition(".")[0]
    return LEVEL_OF.get(name)


MODULES = dict(modules())


def under(name, roots):
    return any(name == root or name.startswith(root + ".") for root in roots)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    if name in ("container", "deploy"):
        return
    assert level(name) is not None, f"{name} has no level"
    for imported in imports_of(MODULES[name]):
        if imported.split(".")[0] not in ("container", "model", "deploy"):
            continue
        same_package = name.split(".")[0] == imported.split(".")[0] in ("model", "deploy")
        assert same_package or level(imported) < level(name), f"{name} imports {imported}"


@pytest.mark.parametrize("name", MODULES)
def test_third_party_packages_stay_where_they_belong(name):
    for imported in imports_of(MODULES[name]):
        package = imported.split(".")[0]
        assert package not in FORBIDDEN or name == UNPICKLES, f"{name} imports {imported}"
        assert package not in ONLY_UNDER or under(name, ONLY_UNDER[package]), f"{name} imports {imported}"


@pytest.mark.parametrize("name", MODULES)
def test_nothing_unpickles_but_the_conversion_of_weights(name):
    text = MODULES[name].read_text()
    assert text.count("torch.load") == text.count("weights_only=True") == (name == UNPICKLES)
    assert "allow_pickle" not in text
    assert "unpickle(" not in text or name in (UNPICKLES, CONVERTS)
    assert CONVERTS not in text or name == "container.weights_cli"


def test_serving_with_the_published_parsers_imports_nothing_that_unpickles():
    code = f"import sys, container.vton_api, model.maskers.auto; print({CONVERTS!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_longer_than_400_lines(name):
    assert len(MODULES[name].read_text().splitlines()) <= 400


def test_importing_the_door_loads_no_model_code_and_reads_nothing():
    code = "import sys, container.vton_api; print('torch' in sys.modules or 'diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
