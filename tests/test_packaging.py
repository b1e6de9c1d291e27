"""What is installed, where this repository is not: all packages, and all files that they read."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli

REPOSITORY = Path(__file__).resolve().parent.parent
CODE = ("container", "model", "deploy")
READ_BY_PEOPLE = {"deploy/README.md"}
MADE_BY_RUNNING = {"__pycache__", "cdk.out", "cdk.context.json"}


@pytest.fixture(scope="module")
def declared():
    return tomli.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]


def relative(paths):
    return {
        str(path.relative_to(REPOSITORY)) for path in paths if path.is_file() and not MADE_BY_RUNNING & set(path.parts)
    }


def test_every_folder_with_python_is_a_package_that_is_installed(declared):
    files = relative(path for folder in CODE for path in (REPOSITORY / folder).rglob("*.py"))
    assert {str(Path(name).parent).replace("/", ".") for name in files} == set(declared["packages"])


def test_every_other_file_of_the_packages_is_installed_too(declared):
    """The programs that `vton local` and `vton demo` start, the page, the weights, the context of the CDK."""
    files = relative(path for folder in CODE for path in (REPOSITORY / folder).rglob("*") if path.suffix != ".py")
    installed = set()
    for package, patterns in declared["package-data"].items():
        for pattern in patterns:
            found = relative((REPOSITORY / package.replace(".", "/")).glob(pattern))
            assert found, f"{package} has no {pattern}"
            installed |= found
    assert files - installed == READ_BY_PEOPLE
