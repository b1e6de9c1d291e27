"""What the service does when more is asked of it than it can do: `python -m bench.load --help`.

The real process with an engine that only waits. Its capacity is measured first; then requests arrive at random times,
at shares of that rate, whether or not the earlier ones are answered. Every time is counted from when a request was due,
so that a client that is late hides nothing.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import tempfile
import time
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable

import click
import numpy as np

from bench.files import json_option, write_report
from bench.service import (
    OK,
    PICTURE_S,
    PLACES,
    Answer,
    Caller,
    Service,
    closed_loop,
    engine_environment,
    goodput,
    machine,
    serving,
    surroundings,
)

SEED = 0  # of the arrivals
PING_EVERY_S = 0.02
MEMORY_EVERY_S = 0.25
OVERLOADED = 429

# What the service promises above its capacity.
GOODPUT_OF_PEAK = 0.95
REFUSED_P99_MS = 100.0
PING_P999_MS = 200.0
MEMORY_GROWTH = 0.05  # from the second quarter of a level, when its queue has filled, to the last


def _shares(_context: click.Context, _option: click.Parameter, levels: str) -> list[float]:
    try:
        shares = [float(level) / 100 for level in levels.split(",")]
    except ValueError as exc:
        raise click.BadParameter("numbers with commas between them") from exc
    if not all(0 < share < math.inf for share in shares):
        raise click.BadParameter("each must be above 0")
    return shares


@click.command()
@click.option("--seconds", type=click.FloatRange(0.5), default=60.0, show_default=True, help="Of each level.")
@click.option(
    "--levels",
    "shares",
    default="50,100,150",
    show_default=True,
    callback=_shares,
    help="Shares of the capacity, percent.",
)
@click.option("--picture-s", type=PICTURE_S, default=0.25, show_default=True, help="Seconds that the engine waits.")
@json_option()
def main(seconds: float, shares: list[float], picture_s: float, json_path: Path | None) -> None:
    """Measure the capacity of the service, then offer it shares of that; print what came of it, level by level."""
    about = {**machine(), "seconds": seconds, "picture_s": picture_s, "places": PLACES}
    with tempfile.TemporaryDirectory() as folder, surroundings() as (cloud, images):
        environ = engine_environment("waiting", picture_s, steps=1)
        with serving(cloud, images, environ, Path(folder) / "serve.log") as service:
            figures = {**about, **asyncio.run(_measure(service, seconds, shares))}
    click.echo(_table(figures))
    write_report(json_path, figures)


async def _measure(service: Service, seconds: float, shares: Sequence[float]) -> dict[str, Any]:
    async with Caller(service) as caller:
        await closed_loop(caller, 0.0, PLACES)  # warm-up
        capacity = goodput(*await closed_loop(caller, seconds, PLACES))
        if not capacity:
            raise click.ClickException("the service made no pictures")
        levels = [await _level(service, caller, share, share * capacity, seconds) for share in shares]
    peak = max(capacity, *(level["goodput_per_s"] for level in levels))
    for level in levels:
        level["goodput_of_peak"] = round(level["goodput_per_s"] / peak, 3)
    return {
        "capacity_per_s": round(capacity, 3),
        "memory_at_the_end_mb": round(service.memory_mb(), 1),
        "levels": levels,
        "promises": promises(max(levels, key=lambda level: float(level["share"]))),
    }


async def _level(service: Service, caller: Caller, share: float, per_s: float, seconds: float) -> dict[str, Any]:
    begins = time.monotonic()
    ends = begins + seconds
    answers, pings, memory_mb = await asyncio.gather(
        at_times(arrivals(per_s, begins, ends), caller.ask),
        at_times(np.arange(begins, ends, PING_EVERY_S).tolist(), caller.ping),
        _watch_memory(service, ends),
    )
    accepted = [answer for answer in answers if answer.status == OK]
    refused = [answer for answer in answers if answer.status == OVERLOADED]
    quarter = max(1, len(memory_mb) // 4)
    return {
        "share": share,
        "offered_per_s": round(len(answers) / seconds, 3),
        "goodput_per_s": round(goodput(answers, ends), 3),
        "accepted": {"count": len(accepted), **percentiles_ms(accepted, 50, 95, 99)},
        "refused": {"count": len(refused), **percentiles_ms(refused, 50, 95, 99)},
        "failed": len(answers) - len(accepted) - len(refused),
        "ping": {"count": len(pings), **percentiles_ms(pings, 50, 99, 99.9)},
        "pings_failed": sum(ping.status != OK for ping in pings),
        "memory_second_quarter_mb": round(statistics.median(memory_mb[quarter : 2 * quarter]), 1),
        "memory_last_quarter_mb": round(statistics.median(memory_mb[-quarter:]), 1),
        "client_late_at_most_ms": round(1000 * max(sent.late_s for sent in (*answers, *pings)), 1),
    }


def arrivals(per_s: float, begins: float, ends: float) -> list[float]:
    """Times between two others at which requests arrive that know nothing of each other.

    Their number is that of the rate, so that no level is more or less than it says: a Poisson process given its count.
    """
    count = max(1, round(per_s * (ends - begins)))
    return sorted(np.random.default_rng(SEED).uniform(begins, ends, count).tolist())


async def at_times(times: Sequence[float], send: Callable[[float], Awaitable[Answer]]) -> list[Answer]:
    """Sends at each of the times (time.monotonic()); every answer, once the last is there."""
    under_way = []
    for due in times:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        under_way.append(asyncio.ensure_future(send(due)))
    return list(await asyncio.gather(*under_way))


async def _watch_memory(service: Service, ends: float) -> list[float]:
    samples = [service.memory_mb()]
    while time.monotonic() < ends:
        await asyncio.sleep(MEMORY_EVERY_S)
        samples.append(service.memory_mb())
    return samples


def percentiles_ms(answers: Sequence[Answer], *percents: float) -> dict[str, float | None]:
    """Milliseconds within which so many percent were answered ("p99_ms"), by the nearest rank; None where none were."""
    times = sorted(1000 * answer.seconds for answer in answers)
    ranks = {percent: max(1, math.ceil(percent * len(times) / 100)) for percent in percents}
    return {f"p{percent:g}_ms": round(times[rank - 1], 1) if times else None for percent, rank in ranks.items()}


def promises(level: Mapping[str, Any]) -> dict[str, bool]:
    """What is promised above capacity, and whether this level kept it; nothing for a level that is not above it."""
    if level["share"] <= 1:
        return {}
    refused_ms, ping_ms = level["refused"]["p99_ms"], level["ping"]["p99.9_ms"]
    growth = level["memory_last_quarter_mb"] / level["memory_second_quarter_mb"] - 1
    return {
        f"goodput at least {GOODPUT_OF_PEAK:.0%} of the peak": level["goodput_of_peak"] >= GOODPUT_OF_PEAK,
        f"refusals under {REFUSED_P99_MS:g} ms at p99": refused_ms is not None and refused_ms < REFUSED_P99_MS,
        f"/ping under {PING_P999_MS:g} ms at p99.9": ping_ms < PING_P999_MS,
        f"memory grows by at most {MEMORY_GROWTH:.0%}": growth <= MEMORY_GROWTH,
        "nothing but pictures and refusals": level["failed"] == level["pings_failed"] == 0,
    }


def _table(figures: Mapping[str, Any]) -> str:
    """The figures as text, a column for each level, and the promises below."""
    about = {name: value for name, value in figures.items() if name not in ("levels", "promises")}
    lines = ["  ".join(f"{name} {value}" for name, value in about.items())]
    columns = [_flat(level) for level in figures["levels"]]
    for name in columns[0]:
        cells = ("-" if column[name] is None else f"{column[name]:g}" for column in columns)
        lines.append(f"{name.replace('_', ' '):<26}" + "".join(f"{cell:>10}" for cell in cells))
    for promise, is_kept in figures["promises"].items():
        lines.append(f"{'holds' if is_kept else 'BROKEN'}  {promise}")
    return "\n".join(lines)


def _flat(level: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of a level by one name each: "refused_p99_ms"."""
    flat: dict[str, float | None] = {}
    for name, figure in level.items():
        flat.update(
            {f"{name}_{part}": value for part, value in figure.items()} if isinstance(figure, dict) else {name: figure}
        )
    return flat


if __name__ == "__main__":
    main()
