"""Keep what was measured: a file per device, configuration and day, and bench/README.md's tables between markers."""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path
from typing import Any

from bench.files import write_json, write_whole
from bench.memory import peak_text
from bench.sizes import SIZES
from bench.verdicts import ratio_text, verdicts

HERE = Path(__file__).parent
COMPARISON, DRIFT = "comparison", "drift"
NONE_YET = "Nothing is recorded yet."
PROMISED = {"cuda": ("sd15", "float16"), "cpu": ("small", "float32")}  # what the promises speak of, at its own size


def record(report: dict[str, Any], day: date, root: Path = HERE) -> Path:
    """Write `results/<device>-<day>.json` and make the README's table again from all that is there.

    A configuration of which nothing is promised goes to `<device>-<config>-<height>x<width>-<dtype>-<day>.json`, and
    leaves the README as it is.

    Args:
        report: of `bench.pipeline --compare`.
        day: of the measurement.
        root: a folder with `README.md` and `results/`.
    Returns:
        The file.
    Raises:
        ValueError: the README has no place for the table.
        OSError: a file cannot be written.
    """
    path = root / "results" / f"{slug(report)}-{day.isoformat()}.json"
    write_json(path, report)
    if is_promised(report):
        put(root / "README.md", COMPARISON, tables(root / "results"))
    return path


def slug(report: dict[str, Any]) -> str:
    """The GPU's name in lower case with dashes, or "cpu", and the configuration unless it is the promises'."""
    name = str(report["device"])
    if report["device"] == "cuda":
        name = re.sub(r"[^a-z0-9]+", "-", report["device_name"].lower()).strip("-")
    if is_promised(report):
        return name
    return f"{name}-{report['config']}-{report['height']}x{report['width']}-{report['dtype']}"


def is_promised(report: dict[str, Any]) -> bool:
    """Whether it is of the configuration that the promises speak of on such a device."""
    config, dtype = PROMISED[report["device"]]
    size = SIZES[config]
    found = (report["config"], report["dtype"], report["height"], report["width"])
    return found == (config, dtype, size.height, size.width)


def tables(results: Path) -> str:
    """A table for the newest file of each device in the promises' configuration, in the order of their names."""
    newest: dict[str, str] = {}
    for path in sorted(results.glob("*-????-??-??.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        if is_promised(report):
            newest[slug(report)] = table_of_file(path, report)
    return "\n\n".join(newest.values()) or NONE_YET


def table_of_file(path: Path, report: dict[str, Any]) -> str:
    """The heading, the circumstances and the table of one file and the report in it."""
    circumstances = (
        f"{report['config']}, {report['height']}x{report['width']} (height x width), {report['dtype']}, "
        f"{report['rounds']} rounds on {report['clock']}, load average {report['load_average'][0]:g}; "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + f" ([`{path.name}`](results/{path.name}))."
    )
    failed = [f"`{name}` did not run ({why.partition(':')[0]})" for name, why in report.get("failed", {}).items()]
    promises = "\n".join(f"- {verdict.text}" for verdict in verdicts(report))
    remarks = [*(f"{remark}." for remark in failed), *([promises] if promises else [])]
    heading = f"**{report['device_name']}**, {path.stem[-10:]}: {circumstances}"
    return "\n\n".join([heading, table(report), *remarks])


def table(report: dict[str, Any]) -> str:
    """The arms of a comparison as a Markdown table; ratios with their 95 % interval."""
    rows = [
        "| arm | steps | ms per step (p10 to p90) | TFLOP/s | loop, times faster | picture, times faster | "
        "peak MiB | first call |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows += [_row(name, arm) for name, arm in report["arms"].items()]
    return "\n".join(rows)


def _row(name: str, arm: dict[str, Any]) -> str:
    loop, steps = arm["loop_ms"], arm["steps"]
    share = f" ({arm['peak_share']:.0%})" if "peak_share" in arm else ""
    cells = (
        name,
        f"{steps}",
        f"{arm['step_ms']:.1f} ({loop['p10'] / steps:.1f} to {loop['p90'] / steps:.1f})",
        f"{arm['tflop_per_s']:.3g}{share}",
        ratio_text(arm["speedup"], 2),
        ratio_text(arm["whole_speedup"], 2),
        peak_text(arm),
        f"{arm['first_call_s']:.1f} s",
    )
    return f"| {' | '.join(cells)} |"


def put(readme: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`.

    Raises:
        ValueError: the markers are not both there, once.
    """
    before, begin, rest = readme.read_text(encoding="utf-8").partition(f"<!-- {name}:begin -->\n")
    _, end, after = rest.partition(f"<!-- {name}:end -->\n")
    if not begin or not end:
        raise ValueError(f"{readme} has no markers {name}:begin and {name}:end")
    write_whole(readme, f"{before}{begin}{text}\n{end}{after}")


def held(readme: Path, name: str) -> str:
    """What stands between the markers."""
    return (
        readme.read_text(encoding="utf-8").partition(f"<!-- {name}:begin -->\n")[2].partition(f"\n<!-- {name}:end")[0]
    )
