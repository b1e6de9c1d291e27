"""What is promised of a comparison, by the machine that it ran on, and whether it held."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench.memory import LIMIT_BYTES
from bench.sizes import SIZES

BASELINE = "baseline"
COMPILED_BASELINE = f"{BASELINE}, compiled"
EXACT = "exact"
NEAR = 2  # grey levels
NEAR_SHARE = 0.99  # of the values of an exact arm's pictures, within so many grey levels of the baseline's
PROMISED_STEPS = 10  # the baseline's are a multiple: two fifths of them and every knob's cycle come out whole
HOPPER = ("H200", "H100 HBM3")  # what the promises on CUDA are made for
ON_HOPPER = {EXACT: 1.12, "balanced": 1.8, "fast": 4.2}  # times faster than the baseline's loop
BEYOND_FLASH = 1.4  # exact mode's, where the baseline's attention leaves more to gain
ON_CPU = {EXACT: 1.0, "person-only unconditional": 1.25, "no guidance": 1.8}
BEYOND_COMPILED = 1.0
_FLASH_2 = re.compile("pytorch_flash|flash_fwd")  # cuDNN's kernels are called "..._flash_fprop_..."


@dataclass(frozen=True)
class Floor:
    """What a GPU could do at most.

    Attributes:
        tflop_per_s: dense float16 arithmetic; as specified, or 790 as practised on an H200, whose arithmetic an H100
            with HBM3 has too.
        guided_step_ms: of a full step at 1024x768, where more than arithmetic bounds it: attention of 40 channels is
            padded to 64, and exponentials have a rate of their own.
    """

    tflop_per_s: float
    guided_step_ms: float | None = None


FLOORS = {  # by words of what torch calls the GPU; the H100s named "PCIe" and "NVL" are slower
    **dict.fromkeys(HOPPER, Floor(790.0, guided_step_ms=27.2)),
    "A10G": Floor(70.0),
    "L40S": Floor(362.0),
    "L4": Floor(121.0),
}


@dataclass(frozen=True)
class Verdict:
    """One promise.

    Attributes:
        text: the promise, what was found, and whether it holds, in a sentence.
        found, limit: times faster, a share, or bytes.
        holds: whether the promise was kept.
        decides: whether a broken one fails the comparison: not of times on a CPU, which other work disturbs, nor of
            exactness in bfloat16.
    """

    text: str
    found: float
    limit: float
    holds: bool
    decides: bool


def floor_of(device_name: str) -> Floor | None:
    """The floor of a GPU by its name, None for one that is not in the table."""
    return next((floor for name, floor in FLOORS.items() if _is(device_name, name)), None)


def verdicts(report: dict[str, Any]) -> list[Verdict]:
    """Each promise that concerns this comparison; arms that did not run have none.

    Args:
        report: of `bench.pipeline --compare`.
    """
    return [*_exactness(report), *_speed(report), *_memory(report)]


def broken(report: dict[str, Any]) -> list[str]:
    """The verdicts that fail a comparison."""
    return [verdict.text for verdict in verdicts(report) if verdict.decides and not verdict.holds]


def ratio_text(ratio: dict[str, Any], digits: int) -> str:
    """The median with its interval, "-" where that is not known."""
    if ratio["low"] is None:
        return f"{ratio['median']:.{digits}f} (-)"
    return f"{ratio['median']:.{digits}f} ({ratio['low']:.{digits}f} to {ratio['high']:.{digits}f})"


def _exactness(report: dict[str, Any]) -> Iterator[Verdict]:
    for name, arm in report["arms"].items():
        if name == BASELINE or "near_baseline_share" not in arm:
            continue
        share = arm["near_baseline_share"]
        found = f"{name}: {100 * share:.2f} % of values within {NEAR} grey levels of the baseline's"
        rounded = report["dtype"] == "bfloat16"  # to eight bits, which no two ways do alike
        yield _at_least(NEAR_SHARE, share, found, f"at least {100 * NEAR_SHARE:.0f} %", decides=not rounded)


def _speed(report: dict[str, Any]) -> Iterator[Verdict]:
    on_cuda = report["device"] == "cuda"
    small = SIZES["small"]
    if on_cuda and _published(report) and any(_is(report["device_name"], name) for name in HOPPER):
        promised = dict(ON_HOPPER)
    elif not on_cuda and _has(report, config="small", height=small.height, width=small.width):
        promised = dict(ON_CPU)
    else:
        return
    arms = report["arms"]
    if arms[BASELINE]["steps"] % PROMISED_STEPS:
        return
    for name, limit in promised.items():
        if name in arms:
            why = ""
            if on_cuda and name == EXACT:
                limit, why = _beyond_attention(arms[BASELINE]["attention_kernels"])
            ratio = arms[name]["speedup"]
            found = f"{name}: {ratio_text(ratio, 2)} times as fast as the baseline"
            yield _at_least(limit, ratio["median"], found, f"at least {limit:g}{why}", decides=on_cuda)
    ratio = arms.get(EXACT, {}).get("speedup_on_compiled")
    if on_cuda and ratio is not None:
        found = f"{EXACT}: {ratio_text(ratio, 2)} times as fast as the compiled baseline"
        yield _at_least(BEYOND_COMPILED, ratio["median"], found, f"at least {BEYOND_COMPILED:g}")


def _beyond_attention(kernels: list[str]) -> tuple[float, str]:
    """What exact mode has to reach, and why so much, by the baseline's attention kernels."""
    if not kernels:
        return ON_HOPPER[EXACT], ", the baseline's attention kernels not seen,"
    if all(map(_FLASH_2.search, kernels)):
        return BEYOND_FLASH, " on its FlashAttention 2"
    return ON_HOPPER[EXACT], ""


def _memory(report: dict[str, Any]) -> Iterator[Verdict]:
    exact = report["arms"].get(EXACT, {})
    if exact.get("peak_memory_bytes") is None or not _published(report):
        return
    allocated, reserved = exact["peak_memory_bytes"], exact["peak_reserved_bytes"]
    most, holds = max(allocated, reserved), max(allocated, reserved) <= LIMIT_BYTES
    text = (
        f"{EXACT}: {allocated / 1e9:.2f} GB at most, {reserved / 1e9:.2f} GB with what PyTorch reserves; "
        f"at most {LIMIT_BYTES / 1e9:g} GB {_word(holds=holds)}"
    )
    yield Verdict(text, most, LIMIT_BYTES, holds, decides=True)


def _at_least(limit: float, found: float, text: str, promise: str, *, decides: bool = True) -> Verdict:
    holds = found >= limit
    return Verdict(f"{text}; {promise} {_word(holds=holds)}", found, limit, holds, decides)


def _word(*, holds: bool) -> str:
    return "holds" if holds else "is BROKEN"


def _published(report: dict[str, Any]) -> bool:
    size = SIZES["sd15"]
    return _has(report, config="sd15", dtype="float16", height=size.height, width=size.width)


def _has(report: dict[str, Any], **values: object) -> bool:
    return all(report[name] == value for name, value in values.items())


def _is(device_name: str, name: str) -> bool:
    return set(name.split()) <= set(device_name.replace("-", " ").split())
