"""Every row of the fault battery has its check. `make fault` runs the checks against the real process."""

from __future__ import annotations

from pathlib import Path

from faults import rows
from faults.registry import CHECKS, LANES, battery


def test_every_row_of_the_battery_has_a_check_and_every_check_a_row():
    ids = [row.id for row in battery()]
    assert len(set(ids)) == len(ids)
    assert CHECKS.keys() == set(ids)


def test_every_module_of_rows_is_imported():
    written = {path.stem for path in Path(rows.__file__).parent.glob("*.py")} - {"__init__"}
    assert written == set(rows.GROUPS)


def test_every_lane_has_rows():
    assert {registered.lane for registered in CHECKS.values()} == set(LANES)
