"""SECURITY.md names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NAMED = re.findall(r"`(test_\w+)\.(test_\w+)`", (TESTS.parent / "SECURITY.md").read_text())


def test_every_attack_has_a_test():
    table = (TESTS.parent / "SECURITY.md").read_text().split("|---|---|---|\n")[1].split("\n\n")[0]
    assert len(table.splitlines()) == len(NAMED) > 0


@pytest.mark.parametrize(("module", "name"), NAMED)
def test_a_named_test_is_there(module, name):
    assert re.search(rf"^def {name}\(", (TESTS / f"{module}.py").read_text(), re.MULTILINE)
