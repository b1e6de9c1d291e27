"""weights_and_supply_chain: a file of weights that is not the one it should be refuses the start, and runs nothing."""

from __future__ import annotations

import ast
import hashlib
import shutil
import sys
import time
from pathlib import Path
from typing import Callable

from ..registry import not_applicable, row
from ..services import REPOSITORY
from ..stage import Stage

START_LIMIT_S = 240.0
VAE = "sd-vae-ft-mse/diffusion_pytorch_model.safetensors"
MAKER = REPOSITORY / "tests" / "faults" / "make_weights.py"
COMMAND = Path(sys.executable).with_name("vton")
UNPICKLER = REPOSITORY / "model" / "maskers" / "conversion.py"  # reads published pickles, running nothing they name
READERS = {"pickle", "marshal", "shelve", "joblib", "dill", "cloudpickle"}

not_applicable(
    "W11",
    "needs the advisory database, which is not on loopback; `pip-audit -r requirements/pinned.txt` where there is one",
)


def make(stage: Stage, what: str, folder: Path) -> Path:
    """A folder of tiny weights in the published layout, perhaps with something wrong."""
    status, said = stage.ground.zygote.run(MAKER, what, str(folder))
    assert status == 0, said
    return folder


def refused_start(stage: Stage, weights: Path, **environ: str) -> str:
    """What a process with these weights says as it refuses to start; it is never ready and calls nobody."""
    before = stage.canary_hits
    offline = {"HF_ENDPOINT": f"http://127.0.0.1:{stage.canary.port}", "HF_HUB_OFFLINE": "0"}
    everything = stage.environment(**{"VTON_WEIGHTS": str(weights), "VTON_MASKER": "off", **offline, **environ})
    service = stage.ground.zygote.serve("weights", stage.new_folder(stage.row), everything)
    pings, ends = [], time.monotonic() + START_LIMIT_S
    while service.alive and time.monotonic() < ends:
        pings.append(service.ping())
        time.sleep(0.05)
    assert 200 not in pings, "it was ready"
    assert service.process.wait(START_LIMIT_S) not in (0, None)
    said = service.log.read_text()
    assert "Traceback" not in said, said[-500:]
    assert stage.canary_hits == before, "it called the hub"
    refusals = [line for line in service.lines() if line.get("event") == "start_refused"]
    assert len(refusals) == 1, said[-500:]
    return str(refusals[0]["reason"])


@row("W01", lane="models")
def flipped_byte(stage: Stage) -> None:
    """Named, with both hashes."""
    weights = make(stage, "recorded", stage.new_folder("weights"))
    content = bytearray((weights / VAE).read_bytes())
    content[-1] ^= 1
    recorded, found = _sha256((weights / VAE).read_bytes()), _sha256(bytes(content))
    (weights / VAE).write_bytes(content)
    reason = refused_start(stage, weights)
    assert all(part in reason for part in (VAE, recorded, found)), reason


@row("W02", lane="models")
def damaged_files(stage: Stage) -> None:
    """Truncated, empty, missing, a directory: named, and nothing is downloaded instead."""
    whole = make(stage, "recorded", stage.new_folder("weights"))
    damages: dict[str, Callable[[Path], object]] = {
        "truncated": lambda file: file.write_bytes(file.read_bytes()[:1000]),
        "empty": lambda file: file.write_bytes(b""),
        "missing": lambda file: file.unlink(),
        "directory": _make_directory,
    }
    for name, damage in damages.items():
        weights = stage.folder / f"weights-{name}"
        shutil.copytree(whole, weights)
        damage(weights / VAE)
        reason = refused_start(stage, weights)
        assert VAE in reason, f"{name}: {reason}"


@row("W03", lane="models")
def pickle_with_code(stage: Stage) -> str:
    """Never run: the service reads no pickle, and the one command that does refuses what is not data."""
    weights = make(stage, "evil", stage.new_folder("weights"))
    canary = weights / "canary"
    status, said = stage.ground.zygote.run(COMMAND, "weights", "convert", "--dir", str(weights))
    assert status not in (0, None), said
    assert "cannot be converted" in said, said
    assert "Traceback" not in said, said
    reason = refused_start(stage, weights, VTON_MASKER="schp")
    assert not canary.exists(), "the pickle's code was run"
    assert not list(weights.rglob("exp-schp*.safetensors")), "something was made of it"
    return f"the service asks for converted files: {reason[-60:]}"


@row("W06", lane="models")
def weights_that_do_not_fit(stage: Stage) -> str:
    """Refused, naming the key."""
    for what in ("extra-key", "missing-key", "wrong-shape", "wrong-dtype"):
        weights = make(stage, what, stage.new_folder(f"weights-{what}"))
        key = (weights / "key").read_text()
        reason = refused_start(stage, weights)
        assert key in reason, f"{what}: {key} is not in: {reason}"
    return "four whole starts"


@row("W10")
def no_pickles(stage: Stage) -> str:
    """Nothing that runs code out of a file is in the sources, but in the one module that reads it without running."""
    del stage
    found = []
    for folder in ("container", "model", "deploy"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            if path not in (REPOSITORY / "model" / "weights.py", UNPICKLER):
                found += [f"{path.relative_to(REPOSITORY)}: {name}" for name in _unpickling(path)]
    assert not found, found
    importers = [
        path.relative_to(REPOSITORY).as_posix()
        for folder in ("container", "model")
        for path in (REPOSITORY / folder).rglob("*.py")
        if "maskers.conversion" in path.read_text()
    ]
    assert set(importers) <= {"container/weights_cli.py"}, f"the service can reach it: {importers}"
    return "but model/maskers/conversion.py, which `vton weights convert` alone imports" if UNPICKLER.exists() else ""


def _unpickling(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in READERS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in READERS:
            found.append(str(node.module))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            found.append("torch.load")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append("allow_pickle")
    return found


def _make_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
