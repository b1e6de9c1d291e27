"""JSON as RFC 8259 has it: what Python's reader lets through beyond that is refused."""

from __future__ import annotations

import json
from typing import NoReturn

from container.errors import InvalidJson


def loads(body: bytes) -> object:
    """The value in a JSON text.

    Raises:
        InvalidJson: not UTF-8, not JSON, a duplicate key, NaN or Infinity, too deep, or a number too long to read.
    """
    try:
        return json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as exc:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise InvalidJson(type(exc).__name__) from exc


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate key")
    return members


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
