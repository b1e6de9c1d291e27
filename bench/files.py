"""The files of a bench: the option that names a report, how one is written, and the end of a log."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Callable, TypeVar

import click

FILE = click.Path(dir_okay=False, path_type=Path)
LOG_CHARS = 2000  # of a log's end: what a traceback and the line before it take

Function = TypeVar("Function", bound=Callable[..., Any])


def place(_context: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    """The path of an option, tried before the minutes of which it is to keep the figures.

    Raises:
        click.BadParameter: no file can be made there.
    """
    if path is None:
        return None
    try:
        if path.is_file() or not path.exists():
            with tempfile.TemporaryFile(dir=path.parent):
                pass
    except OSError as exc:
        raise click.BadParameter(f"no file can be made in {path.parent}: {exc.strerror}") from exc
    return path


def json_option(told: str = "Write the report here too.") -> Callable[[Function], Function]:
    """`--json`, as `json_path`.

    Args:
        told: its help.
    """
    return click.option("--json", "json_path", type=FILE, callback=place, help=told)


def write_report(path: Path | None, report: dict[str, Any]) -> None:
    """Write a report where it was asked for; comes after everything else that is made of it.

    Args:
        path: None for nowhere.
        report: for JSON.
    Raises:
        click.ClickException: it cannot be written.
    """
    if path is None:
        return
    try:
        write_json(path, report)
    except OSError as exc:
        raise click.ClickException(unwritten(path, exc)) from exc


def unwritten(path: Path, exc: OSError) -> str:
    """What is wrong, as a sentence."""
    return f"{path} cannot be written: {exc.strerror or exc}"


def write_json(path: Path, report: dict[str, Any]) -> None:
    """The report as text; see `write_whole`."""
    write_whole(path, json.dumps(report, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Put all of the text in the place of the file, or leave the file as it is."""
    if path.exists() and not path.is_file():  # such as /dev/stdout, which nothing may take the place of
        path.write_text(text, encoding="utf-8")
        return
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def end_of(log: Path) -> str:
    """The last lines of a log, which may be deleted with its folder."""
    return log.read_text(encoding="utf-8", errors="replace")[-LOG_CHARS:].strip()
