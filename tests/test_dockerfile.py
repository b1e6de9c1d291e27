"""What the Dockerfile promises, read off its text; `make image-test` builds and runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ENTRYPOINT = REPOSITORY / "container" / "entrypoint"
SERVING = ("sagemaker", "baked")
TARGETS = (*SERVING, "runpod")
LISTS = ("image.txt", "image-runpod.txt")
CHANGE_THE_FILE_SYSTEM = ("COPY", "ADD", "RUN")


@dataclass(frozen=True)
class Stage:
    """A stage: what it starts from, and its instructions as (name, arguments)."""

    base: str
    steps: list[tuple[str, str]]

    def all(self, name: str) -> list[str]:
        return [arguments for found, arguments in self.steps if found == name]


@pytest.fixture(scope="module")
def instructions():
    text = re.sub(r"\\\n", " ", (REPOSITORY / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in lines)]


@pytest.fixture(scope="module")
def stages(instructions):
    """Each by its name; the last, which has none, as ""."""
    found: dict[str, Stage] = {}
    for name, arguments in instructions:
        if name == "FROM":
            base, _, alias = arguments.partition(" AS ")
            found[alias] = current = Stage(base, [])
        elif found:
            current.steps.append((name, arguments))
    return found


def in_the_image(stages, target):
    """The steps of a target and of the stages that it starts from, the first ones first."""
    steps, stage = [], stages[target]
    while stage is not None:
        steps = stage.steps + steps
        stage = stages.get(stage.base)
    return steps


def default(instructions, argument):
    (value,) = {a.partition("=")[2] for name, a in instructions if name == "ARG" and a.startswith(f"{argument}=")}
    return value


def test_the_base_is_the_smallest_of_cuda_11_8_with_the_torch_and_python_that_go_with_it(instructions):
    assert default(instructions, "BASE") == "nvidia/cuda:11.8.0-base-ubuntu22.04"
    assert default(instructions, "PYTHON") == "3.9"
    assert default(instructions, "TORCH_INDEX") == "https://download.pytorch.org/whl/cu118"
    pinned = (REPOSITORY / "requirements" / "pinned.txt").read_text()
    assert f"torch=={default(instructions, 'TORCH')}\n" in pinned.replace(" ;", "\n")


def test_every_version_can_be_chosen_by_a_build_argument(stages, instructions):
    assert {stage.base for stage in stages.values()} - set(stages) == {"${BASE}", "${UV_IMAGE}", "scratch"}
    assert {a.partition("=")[0] for a in stages["libraries"].all("ARG")} == {"PYTHON", "TORCH", "TORCH_INDEX"}


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_run_or_taken_from_outside_in_an_image_that_is_deployed(stages, target):
    steps = [(name, arguments) for name, arguments in in_the_image(stages, target) if name in CHANGE_THE_FILE_SYSTEM]
    assert {name for name, _ in steps} == {"COPY"}
    assert all(arguments.startswith("--from=") for _, arguments in steps)
    assert "uv" not in {arguments.split()[0].partition("=")[2] for _, arguments in steps}


@pytest.mark.parametrize("target", TARGETS)
def test_the_code_is_copied_last(stages, target):
    assert stages[target].steps[-1] == ("COPY", "--from=code /opt/app /opt/app")


def test_the_image_for_compiled_steps_is_the_other_with_a_compiler_and_a_cache(stages):
    compiled = stages["compiled"]
    assert compiled.base == "sagemaker"
    assert [name for name, _ in compiled.steps] == ["RUN", "ENV", "COPY"]
    assert "--mount=type=cache" in compiled.all("RUN")[0]
    assert compiled.all("COPY") == ["--from=compilations / /opt/compilations"]
    folders = re.findall(r"_CACHE_DIR=(\S+)", compiled.all("ENV")[0])
    assert folders == ["/opt/compilations/inductor", "/opt/compilations/triton"]
    assert stages["compilations"].base == "scratch"  # the build context takes its place


def test_a_plain_build_makes_the_image_for_sagemaker(stages):
    assert list(stages)[-1] == ""
    assert (stages[""].base, stages[""].steps) == ("sagemaker", [])


@pytest.mark.parametrize(("target", "command"), [("sagemaker", "serve"), ("baked", "serve"), ("runpod", "runpod")])
def test_entry_point_and_command_have_exec_form(stages, target, command):
    steps = dict(in_the_image(stages, target))
    assert json.loads(steps["ENTRYPOINT"]) == ["/opt/app/container/entrypoint"]
    assert json.loads(steps["CMD"]) == [command]
    assert "USER" not in steps


@pytest.mark.parametrize("target", SERVING)
def test_what_serves_is_asked_for_its_health(stages, target):
    steps = dict(in_the_image(stages, target))
    assert json.loads(steps["HEALTHCHECK"].partition(" CMD ")[2])[:2] == ["python", "-c"]


def test_a_worker_listens_on_no_port_and_carries_its_weights(stages):
    steps = in_the_image(stages, "runpod")
    assert not {"EXPOSE", "HEALTHCHECK", "LABEL"} & {name for name, _ in steps}
    assert ("COPY", "--from=verified /opt/weights /opt/weights") in steps
    assert ("ENV", "VTON_WEIGHTS=/opt/weights VTON_VARIANT=${VARIANT}") in steps


def test_a_workers_libraries_are_those_of_the_other_images_and_the_sdk(stages):
    assert stages["runpod-libraries"].base == "libraries"
    ours, more = ({pin_of(line) for line in pins(name)} for name in LISTS)
    assert ours < more
    assert [pin for pin in more - ours if pin.startswith("runpod==")]


@pytest.mark.parametrize("target", SERVING)
def test_the_label_and_the_port_are_those_of_sagemaker(stages, target):
    steps = dict(in_the_image(stages, target))
    assert steps["LABEL"] == "com.amazonaws.sagemaker.capabilities.accept-bind-to-port=true"
    assert steps["EXPOSE"] == "8080"


@pytest.mark.parametrize(("stage", "name"), [("libraries", LISTS[0]), ("runpod-libraries", LISTS[1])])
def test_packages_are_installed_by_their_hashes_from_a_cache_that_does_not_stay(stages, stage, name):
    assert stages[stage].all("COPY")[-1] == f"requirements/{name} /tmp/{name}"
    (run,) = stages[stage].all("RUN")
    assert run.startswith("--mount=type=cache,target=/cache/uv ")
    assert f"--require-hashes --no-deps --requirement /tmp/{name}" in run
    assert run.endswith("uv pip check")


def pins(name):
    """The packages of a list, each with its hashes on one line."""
    text = (REPOSITORY / "requirements" / name).read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def pin_of(line):
    """name==version, without what it is for and its hashes."""
    return line.split(" ")[0]


@pytest.mark.parametrize("name", LISTS)
def test_every_requirement_of_the_image_has_hashes_and_none_is_torch_or_cuda(name):
    packages = pins(name)
    assert all("--hash=sha256:" in line for line in packages)
    assert not [line for line in packages if re.match(r"(torch|triton|nvidia-.*|cuda-.*)==", line)]


def test_the_build_is_given_what_it_copies_and_nothing_else(stages):
    lines = (REPOSITORY / ".dockerignore").read_text().split()
    assert lines[0] == "*"
    given = [line[1:] for line in lines if line.startswith("!")]
    assert set(given) == {"container", "model", *(f"requirements/{name}" for name in LISTS), "LICENSE", "NOTICE"}
    assert all((REPOSITORY / path).exists() for path in given if not path.startswith("requirements"))
    assert stages["code"].all("COPY") == [". /opt/app"]


@pytest.mark.parametrize("stage", ["verified", "baked"])
def test_baked_weights_come_from_a_folder_and_are_verified(stages, stage):
    fetching = re.compile(r"\b(curl|wget|download|aws|huggingface|https?:)")
    assert not [arguments for _, arguments in stages[stage].steps if fetching.search(arguments)]
    assert "--from=weights / /opt/weights" in stages["verified"].all("COPY")
    assert "verify --dir /opt/weights" in stages["verified"].all("RUN")[0]
    assert (stages["weights"].base, stages["weights"].steps) == ("scratch", [])


# The entry point


@pytest.fixture
def entrypoint(tmp_path):
    """It, between a `serve`, a `train` and a worker that tell what became of them."""
    folder = tmp_path / "container"
    folder.mkdir()
    for name in ("serve", "train"):
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $#" $$\nexit 7\n')
        (folder / name).chmod(0o755)
    worker = 'import os, sys\nprint("runpod", len(sys.argv) - 1, os.getpid(), *sys.argv[1:])\nsys.exit(7)\n'
    (folder / "runpod_handler.py").write_text(worker)
    (folder / "entrypoint").write_text(ENTRYPOINT.read_text())
    (folder / "entrypoint").chmod(0o755)
    return folder / "entrypoint"


def start(entrypoint, *arguments):
    environ = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        [entrypoint, *arguments], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    said, refused = process.communicate(timeout=60)
    return process, said, refused


def test_it_can_be_executed():
    assert ENTRYPOINT.stat().st_mode & 0o111 == 0o111


@pytest.mark.parametrize("command", ["serve", "train", "runpod"])
def test_the_command_takes_the_place_of_the_entry_point_so_that_signals_reach_it(entrypoint, command):
    process, said, _ = start(entrypoint, command)
    assert said.split() == [command, "0", str(process.pid)]
    assert process.returncode == 7


def test_a_worker_gets_the_arguments_of_its_sdk(entrypoint):
    _, said, _ = start(entrypoint, "runpod", "--rp_serve_api", "a b")
    assert said.split() == ["runpod", "2", said.split()[2], "--rp_serve_api", "a", "b"]


WRONG = [[], [""], ["bash"], ["serve", "train"], ["serve", "--port"], ["../serve"], ["-h"], ["serve\n"], ["$(id)"]]


@pytest.mark.parametrize("arguments", WRONG)
def test_any_other_argument_is_refused_with_64(entrypoint, arguments):
    process, said, refused = start(entrypoint, *arguments)
    assert (process.returncode, said) == (64, "")
    assert "serve or train" in refused


def test_train_is_refused_where_it_was_left_out(entrypoint):
    (entrypoint.parent / "train").unlink()
    process, said, refused = start(entrypoint, "train")
    assert (process.returncode, said) == (64, "")
    assert refused == "this image was built without training; its build argument TRAINING=yes adds it\n"
