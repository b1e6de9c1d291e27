"""`make fault`: runs the rows, prints the table, and closes with one line that counts.

Arguments choose rows by id or group; without any, all are run.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import click

from . import rows as _rows  # noqa: F401 - importing it registers the checks
from .registry import CHECKS, LANES, NotApplicable, Row, battery
from .services import patience
from .stage import Ground, Stage

PASSED, FAILED, SKIPPED = "pass", "FAIL", "n/a"
CASE_CHARACTERS = 66
LAST_LANE = LANES[-1]


@dataclass(frozen=True)
class Outcome:
    """How a row ended, and why."""

    verdict: str
    why: str
    seconds: float


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 where no row failed."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # moto's web server logs every call
    chosen = _chosen(arguments)
    outcomes: dict[str, Outcome] = {}
    ground = Ground()
    try:
        _run_lanes(ground, chosen, outcomes)
    finally:
        failed = len(outcomes) < len(chosen) or any(outcome.verdict == FAILED for outcome in outcomes.values())
        ground.close(keep=failed)
    _print_table(chosen, outcomes)
    for name, outcome in outcomes.items():  # once more, since the end of a long output is what is kept of it
        if outcome.verdict == FAILED:
            click.echo(f"{name} failed: {outcome.why}")
    if failed:
        click.echo(f"logs of the processes: {ground.folder}")
    click.echo(f"limits of milliseconds were given {patience():.1f} times, for the load of this machine")
    counts = {
        verdict: sum(outcome.verdict == verdict for outcome in outcomes.values())
        for verdict in (PASSED, FAILED, SKIPPED)
    }
    click.echo(f"{counts[PASSED]} passed, {counts[FAILED]} failed, {counts[SKIPPED]} skipped")
    return 1 if failed else 0


def _chosen(arguments: Sequence[str]) -> list[Row]:
    every = battery()
    known = {name for row in every for name in (row.id, row.group)}
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise SystemExit(f"no such row or group: {', '.join(unknown)}")
    return [row for row in every if not arguments or row.id in arguments or row.group in arguments]


def _run_lanes(ground: Ground, chosen: Sequence[Row], outcomes: dict[str, Outcome]) -> None:
    threads: list[threading.Thread] = []
    for lane in LANES:
        rows = [row for row in chosen if CHECKS[row.id].lane == lane]
        thread = threading.Thread(target=_run_lane, args=(ground, lane, rows, outcomes), name=lane)
        if lane == LAST_LANE:
            for other in threads:
                other.join()
        thread.start()
        threads.append(thread)
    threads[-1].join()


def _run_lane(ground: Ground, lane: str, rows: Sequence[Row], outcomes: dict[str, Outcome]) -> None:
    if not rows:
        return
    stage = Stage(ground, lane)
    try:
        for row in rows:
            outcomes[row.id] = outcome = _run_row(stage, row)
            click.echo(f"{row.id}  {outcome.verdict}  {outcome.seconds:.1f} s", err=True)
    finally:
        stage.close()


def _run_row(stage: Stage, row: Row) -> Outcome:
    """The row, and afterwards the question whether the service is as well as before."""
    stage.row = row.id
    stage.touched.clear()
    began = time.monotonic()
    try:
        verdict, why = PASSED, CHECKS[row.id].check(stage) or ""
    except NotApplicable as exc:
        verdict, why = SKIPPED, str(exc)
    except Exception as exc:
        verdict, why = FAILED, _told(stage, exc)
    seconds = time.monotonic() - began
    try:
        stage.check()
    except Exception as exc:
        verdict, why = FAILED, f"{why}; afterwards: {_told(stage, exc)}".removeprefix("; ")
        stage.replace()
    return Outcome(verdict, why, seconds)


def _told(stage: Stage, exc: Exception) -> str:
    """One line for the table; the traceback goes to a file."""
    (stage.ground.folder / f"{stage.row}.txt").write_text(traceback.format_exc())
    frames = [frame for frame in traceback.extract_tb(exc.__traceback__) if "/rows/" in frame.filename]
    where = f" ({frames[-1].name}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
    kind = "" if isinstance(exc, AssertionError) and str(exc) else f"{type(exc).__name__}: "
    return f"{kind}{' '.join(str(exc).split())[:400]}{where}"


def _print_table(chosen: Sequence[Row], outcomes: dict[str, Outcome]) -> None:
    for group in dict.fromkeys(row.group for row in chosen):
        click.echo(f"\n{group}")
        for row in chosen:
            if row.group != group:
                continue
            outcome = outcomes.get(row.id, Outcome(FAILED, "was not run", 0.0))
            case = row.case if len(row.case) <= CASE_CHARACTERS else row.case[: CASE_CHARACTERS - 3] + "..."
            line = f"  {row.id:4} {outcome.verdict:5} {outcome.seconds:5.1f} s  {case:{CASE_CHARACTERS}}  {outcome.why}"
            click.echo(line.rstrip())
    click.echo("")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
