"""From the start of the container's process to its first good /ping, by stage: `python -m bench.coldstart --help`."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import psutil
import requests
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file

from bench.files import end_of, json_option, write_report
from bench.sizes import SIZES, Size
from container.settings import Settings, SettingsError
from deploy.local_container import REPOSITORY, SERVE, free_port
from model import weights
from model.catvton import published
from model.catvton.checkpoint import write_merged
from model.device import DEVICES, DTYPES, choose_device

ENGINE, VARIANT = "catvton", "mix"
SEPARATE, MERGED = "separate", "merged"
BEFORE = (sys.executable, "-m", "bench.coldstart_before")
OK = 200
POLL_S = 0.01
PING_TIMEOUT_S = 5.0
START_LIMIT_S = 3600.0  # a warm-up at full size takes minutes on a CPU
STOP_LIMIT_S = 30.0
CHUNK_BYTES = 16 * 2**20
RANDOM_NUMBERS = 2**22  # which every tensor repeats: what the weights are changes no time
OF_OTHERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # would hold the process back; the deployed one has none
SIZE = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True)
class Arm:
    """One way to start: the command, and the directory of its weights."""

    name: str
    command: Sequence[str]
    weights_dir: Path


@dataclass(frozen=True)
class Start:
    """One start; the unit is in each name.

    Attributes:
        service_imports_s: from the start of the process to its line `starting`: what the service itself imports.
        engine_imports_s: torch and diffusers.
        verify_s: hashing; goes on beside the imports and the loading, except in the way before.
        load_s: the networks, built from their configurations.
        move_s: their tensors, from the files to the device, in its dtype.
        warm_up_s: the throw-away picture.
        ready_s: from the start of the process to the first 200 of /ping.
        processor_s: of all its cores until then.
        peak_rss_bytes: of the process until then; None where the system does not tell.
    """

    service_imports_s: float
    engine_imports_s: float
    verify_s: float
    load_s: float
    move_s: float
    warm_up_s: float
    ready_s: float
    processor_s: float
    peak_rss_bytes: int | None


def write_weights(root: Path, size: Size) -> None:
    """Random float16 weights in the published layout below `root`, with the base model's attention that is not read."""
    numbers = torch.randn(RANDOM_NUMBERS, generator=torch.Generator().manual_seed(0)).half()
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**size.unet), AutoencoderKL(**size.vae)
    for folder, module in ((published.UNET_FOLDER, unet), (published.VAE_FOLDER, vae)):
        module.save_config(root / folder)
        tensors = {key: _filled(key, tensor.shape, numbers) for key, tensor in module.state_dict().items()}
        save_file(tensors, root / folder / published.WEIGHT_FILES[0])
    DDIMScheduler(**published.SCHEDULER_CONFIG).save_config((root / published.SCHEDULER_FILE).parent)
    file = root / published.ATTENTION_FOLDERS[VARIANT] / published.ATTENTION_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    attentions = [module for name, module in unet.named_modules() if name.endswith("attn1")]
    save_file(
        {
            f"{order}.{key}": _filled(key, tensor.shape, numbers)
            for order, attention in enumerate(attentions)
            for key, tensor in attention.state_dict().items()
        },
        file,
    )


def _filled(key: str, shape: torch.Size, numbers: torch.Tensor) -> torch.Tensor:
    if len(shape) == 1:
        return torch.full(shape, 0.0 if key.endswith("bias") else 1.0, dtype=torch.float16)
    count = shape.numel()
    scaled = numbers / math.sqrt(count / shape[0])  # so that a picture of it is finite
    return scaled.repeat(-(-count // numbers.numel()))[:count].view(shape)


def write_merged_weights(separate: Path, merged: Path) -> None:
    """What `vton weights pack --merged` makes of them, without the copying and the proof."""
    for name in (published.UNET_FOLDER, published.VAE_FOLDER):
        (merged / name).mkdir(parents=True, exist_ok=True)
        (merged / name / published.CONFIG_FILE).write_bytes((separate / name / published.CONFIG_FILE).read_bytes())
    for name in (published.SCHEDULER_FILE, published.MERGED_FILES[VARIANT]):
        (merged / name).parent.mkdir(parents=True, exist_ok=True)
    (merged / published.SCHEDULER_FILE).write_bytes((separate / published.SCHEDULER_FILE).read_bytes())
    write_merged(separate, VARIANT, merged / published.MERGED_FILES[VARIANT])


def kept_weights(folder: Path, config: str) -> Path:
    """The folder with the recorded weights of a configuration, `separate` and `merged`.

    Raises:
        WeightsError: some that were kept are damaged.
        OSError: they cannot be written; what was begun counts for nothing the next time.
    """
    kept = folder / config
    if not kept.exists():
        half_written = folder / f"{config}.part"
        if half_written.exists():
            shutil.rmtree(half_written)
        write_weights(half_written / SEPARATE, SIZES[config])
        write_merged_weights(half_written / SEPARATE, half_written / MERGED)
        half_written.rename(kept)
    for name in (SEPARATE, MERGED):
        weights.verify(kept / name, ENGINE, VARIANT)
    return kept


def prepare_pages(folder: Path, *, cold: bool) -> None:
    """Brings every file of the folder into the page cache, or drops it from there."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("r+b" if cold else "rb", buffering=0) as stream:
            if cold:
                os.fsync(stream.fileno())  # what is not on the disk yet would stay
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                continue
            buffer = bytearray(CHUNK_BYTES)
            while stream.readinto(buffer):
                pass


def start(arm: Arm, environ: Mapping[str, str], log: Path) -> Start:
    """Start the process, wait until it is ready, stop it, and say where the time went.

    Raises:
        click.ClickException: it ended, or was not ready in time; the text has the end of the log.
    """
    port = free_port()
    own = {name: value for name, value in os.environ.items() if not name.startswith(("VTON_", "SAGEMAKER_"))}
    own = {name: value for name, value in own.items() if name not in OF_OTHERS}
    given = {**own, **environ, "VTON_WEIGHTS": str(arm.weights_dir), "VTON_PORT": str(port), "VTON_HOST": "127.0.0.1"}
    with log.open("wb") as sink:
        began = time.time()
        process = subprocess.Popen(arm.command, cwd=REPOSITORY, env=given, stderr=sink)  # noqa: S603 - of this bench
    try:
        _wait_until_ready(process, port, log)
        ready_s = time.time() - began
        spent = psutil.Process(process.pid).cpu_times()
        peak = _peak_rss_bytes(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return _told(_events(log), began, ready_s, spent.user + spent.system, peak)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    ends = time.monotonic() + START_LIMIT_S
    while process.poll() is None and time.monotonic() < ends:
        try:
            if requests.get(f"http://127.0.0.1:{port}/ping", timeout=PING_TIMEOUT_S).status_code == OK:
                return
        except requests.exceptions.RequestException:
            pass
        time.sleep(POLL_S)
    status = process.poll()
    raise click.ClickException(f"the process is not ready, exit status {status}; its log ends with\n{end_of(log)}")


def _peak_rss_bytes(pid: int) -> int | None:
    """The high-water mark of the process itself; what wait() tells includes the process that it was forked from."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return None
    return None if found is None else 1024 * int(found.group(1))


def _events(log: Path) -> dict[str, dict[str, Any]]:
    """The lines of the log by their event."""
    lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
    return {event["event"]: event for event in map(json.loads, lines)}


def _told(
    events: Mapping[str, Mapping[str, Any]], began: float, ready_s: float, processor_s: float, peak: int | None
) -> Start:
    stamp = events["starting"]["timestamp"].replace("Z", "+00:00")
    verified = events["weights_verified"]
    engine, move_s = events["engine_loaded"], events["weights_read"]["elapsed_ms"] / 1000
    return Start(
        service_imports_s=datetime.fromisoformat(stamp).timestamp() - began,
        engine_imports_s=engine["imports_ms"] / 1000,
        verify_s=verified["elapsed_ms"] / 1000,
        load_s=engine["load_ms"] / 1000 - move_s,
        move_s=move_s,
        warm_up_s=events["warmed_up"]["elapsed_ms"] / 1000,
        ready_s=ready_s,
        processor_s=processor_s,
        peak_rss_bytes=peak,
    )


def measure(arms: Sequence[Arm], environ: Mapping[str, str], logs: Path, *, runs: int, cold: bool) -> dict[str, Any]:
    """Every arm `runs` times, in turn.

    Returns:
        By arm: its starts, and the median of each number.
    """
    starts: dict[str, list[Start]] = {arm.name: [] for arm in arms}
    for turn in range(runs):
        for arm in [*arms[turn % len(arms) :], *arms[: turn % len(arms)]]:
            prepare_pages(arm.weights_dir, cold=cold)
            starts[arm.name].append(start(arm, environ, logs / f"{arm.name}-{turn}.log"))
    return {name: {"median": _medians(each), "runs": [asdict(one) for one in each]} for name, each in starts.items()}


def _medians(starts: Sequence[Start]) -> dict[str, float | None]:
    rows = [asdict(each) for each in starts]
    return {
        name: None if any(row[name] is None for row in rows) else round(statistics.median(row[name] for row in rows), 3)
        for name in rows[0]
    }


def ratios(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times the way before takes of each other arm: ready, ready without the warm-up, processor time."""
    found = {}
    before = arms["before"]["median"]
    for name in (name for name in arms if name != "before"):
        now = arms[name]["median"]
        found[name] = {
            "ready": round(before["ready_s"] / now["ready_s"], 2),
            "ready_without_warm_up": round(
                (before["ready_s"] - before["warm_up_s"]) / (now["ready_s"] - now["warm_up_s"]), 2
            ),
            "processor": round(before["processor_s"] / now["processor_s"], 2),
        }
    return found


def table(report: Mapping[str, Any]) -> str:
    """The medians, as the README shows them."""
    arms = report["arms"]
    lines = [f"| {'median of ' + str(report['runs'])} | {' | '.join(arms)} |", "|---|" + "---|" * len(arms)]
    for name in Start.__dataclass_fields__:
        cells = [_cell(name, arm["median"][name]) for arm in arms.values()]
        lines.append(f"| {name.rpartition('_')[0].replace('_', ' ')} | {' | '.join(cells)} |")
    for name in ("ready", "ready_without_warm_up", "processor"):
        cells = ["1", *(f"{of[name]:.2f}" for of in report["before_times"].values())]
        lines.append(f"| before / this: {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(name: str, number: float | None) -> str:
    if number is None:
        return "-"
    return f"{number / 2**20:,.0f} MiB" if name.endswith("_bytes") else f"{number:.2f} s"


@contextmanager
def _kept(folder: Path | None) -> Iterator[Path]:
    """The folder, or one that is gone after the block."""
    with nullcontext(str(folder)) if folder is not None else tempfile.TemporaryDirectory(prefix="coldstart-") as place:
        yield Path(place)


@click.command()
@click.option("--config", type=click.Choice(list(SIZES)), default="sd15", show_default=True, help="Size of the model.")
@click.option(
    "--size",
    default="768x1024",
    show_default=True,
    help="Width x height of the service's pictures, px: 256 to 2048 in steps of 64.",
)
@click.option("--device", type=click.Choice(["auto", *DEVICES]), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(["auto", *DTYPES]), default="auto", show_default=True)
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Counted starts of each way.")
@click.option("--cold", is_flag=True, help="Drop the weights' pages before each start.")
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep weights and logs here, by --config, and use the weights that are there.",
)
@json_option()
def main(
    config: str, size: str, device: str, dtype: str, runs: int, cold: bool, keep: Path | None, json_path: Path | None
) -> None:
    """Starts the container's process in three ways, in turn, on random weights, and says where the time goes.

    `before`: hash everything, then load the published files, then draw a picture at full size. `separate`: as it is,
    from the published files. `merged`: as it is, from one file. On a CPU of few cores the first takes minutes at the
    default size.
    """
    settings = _settings(size, device, dtype)
    if cold and not hasattr(os, "posix_fadvise"):
        raise click.BadParameter("this system drops no pages", param_hint="--cold")
    load_before = [round(each, 2) for each in os.getloadavg()]
    with _kept(keep) as place:
        try:
            folder = kept_weights(place, config)
        except (OSError, weights.WeightsError) as exc:
            raise click.ClickException(str(exc)) from exc
        separate, merged = folder / SEPARATE, folder / MERGED
        arms = [Arm("before", BEFORE, separate), Arm("separate", SERVE, separate), Arm("merged", SERVE, merged)]
        settings["VTON_OUTPUT_DIR"] = str(folder / "results")
        measured = measure(arms, settings, folder, runs=runs, cold=cold)
        report = {
            "config": config,
            "size": size,
            "device": device,
            "dtype": dtype,
            "runs": runs,
            "page_cache": "cold" if cold else "warm",
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "load_average_before": load_before,
            "weights_bytes": {arm.name: _bytes_in(arm.weights_dir) for arm in arms},
            "arms": measured,
            "before_times": ratios(measured),
        }
    print(table(report))
    write_report(json_path, report)


def _settings(size: str, device: str, dtype: str) -> dict[str, str]:
    """What the process is told, but for its places.

    Raises:
        click.UsageError: the size is not WIDTHxHEIGHT, the service refuses it, or the device is not there.
    """
    match = SIZE.fullmatch(size)
    if match is None:
        raise click.BadParameter("must be WIDTHxHEIGHT", param_hint="--size")
    size_px = {"VTON_WIDTH": match.group(1), "VTON_HEIGHT": match.group(2)}
    try:
        Settings.from_env(size_px)
        choose_device(device)
    except SettingsError as exc:
        raise click.BadParameter(str(exc), param_hint="--size") from exc
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc
    return {"VTON_VARIANT": VARIANT, "VTON_MASKER": "off", "VTON_DEVICE": device, "VTON_DTYPE": dtype, **size_px}


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


if __name__ == "__main__":
    main()
