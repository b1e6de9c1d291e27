"""The rows of the battery, and which check holds each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Optional

if TYPE_CHECKING:
    from .stage import Stage

BATTERY = Path(__file__).with_name("battery.json")
# Lanes run side by side, the rows of one after another: against the stand-in engine, against real models, those that
# mostly wait (so that nobody waits for them), and what looks back at all the others.
LANES = ("service", "models", "waiting", "last")

Check = Callable[["Stage"], Optional[str]]  # returns what the table should say of it, if anything


class NotApplicable(Exception):
    """The row cannot be held here; the text is why."""


@dataclass(frozen=True)
class Row:
    """One row as battery.json has it."""

    id: str
    group: str
    case: str
    expected: str


@dataclass(frozen=True)
class Registered:
    """The check of a row, and the lane it runs in."""

    check: Check
    lane: str


CHECKS: dict[str, Registered] = {}


def row(row_id: str, lane: str = "service") -> Callable[[Check], Check]:
    """Registers the check of a row; it raises AssertionError where the service breaks the row's promise."""

    def register(check: Check) -> Check:
        if row_id in CHECKS or lane not in LANES:
            raise ValueError(f"{row_id} is registered already, or {lane} is no lane")
        CHECKS[row_id] = Registered(check, lane)
        return check

    return register


def not_applicable(row_id: str, why: str) -> None:
    """Registers a row of which nothing can be run yet."""

    def skip(_stage: Stage) -> None:
        raise NotApplicable(why)

    row(row_id)(skip)


def battery() -> list[Row]:
    """The rows, in the battery's order."""
    return [Row(**entry) for entry in json.loads(BATTERY.read_text())]
