"""What is published where: the repositories and files of `manifest.json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Optional

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, TypeAdapter

MANIFEST = Path(__file__).with_name("manifest.json")
MERGED_FOLDERS = {"catvton": "CatVTON"}  # engine -> where one file may hold every tensor of a variant, by its name
TENSORS = ".safetensors"


class WeightsError(Exception):
    """A weight file is missing, damaged or unobtainable; the text is one sentence that names it."""


def _inside(path: str) -> str:
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError("the path leaves the directory")
    return path


Size = Annotated[int, Field(gt=0)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Commit = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
Inside = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._/-]+$"), AfterValidator(_inside)]
Part = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+/[a-z0-9]+$")]
MaybeSize = Optional[Size]
MaybeSha256 = Optional[Sha256]
MaybeCommit = Optional[Commit]


class Strict:
    """A dataclass that pydantic reads strictly."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class WeightFile(Strict):
    """One published file at `path` in its repository; size and hash are None where unknown until first fetched.

    `parts` are the "engine/variant" names that need it. `converted`: it is a pickle, and what they read is the
    safetensors that was made of it, in the same folder under the same stem.
    """

    path: Inside
    bytes: MaybeSize
    sha256: MaybeSha256
    parts: tuple[Part, ...]
    converted: bool = False

    @property
    def is_merged(self) -> bool:
        """Whether what is read of it stands in the merged file, too, where an engine has such."""
        return self.path.endswith(TENSORS)


@dataclass(frozen=True)
class Repository(Strict):
    """One published repository, kept in `folder`; a `revision` of None is chosen and recorded by the first download.

    `licence` is its name, `notice` says in a sentence what that means for a user.
    """

    folder: Inside
    repo_id: str
    revision: MaybeCommit
    licence: str
    notice: str
    files: tuple[WeightFile, ...]


@dataclass(frozen=True)
class _Manifest(Strict):
    version: Literal[1]
    repositories: tuple[Repository, ...]


def manifest() -> tuple[Repository, ...]:
    """The published repositories, in the order in which they are fetched.

    Raises:
        WeightsError: the manifest of this installation is damaged.
    """
    try:
        return TypeAdapter(_Manifest).validate_json(MANIFEST.read_bytes()).repositories
    except (OSError, ValueError) as exc:
        raise WeightsError(f"{MANIFEST} is damaged; install the package again") from exc


def files_for(engine: str, variant: str) -> list[tuple[Repository, WeightFile]]:
    """The files that a variant of an engine reads, each with its repository.

    Raises:
        WeightsError: nothing is published under that name.
    """
    every = [(repository, file) for repository in manifest() for file in repository.files]
    needed = [(repository, file) for repository, file in every if f"{engine}/{variant}" in file.parts]
    if not needed:
        names = sorted({part for _, file in every for part in file.parts})
        raise WeightsError(f"{MANIFEST.name} has no weights {engine}/{variant}; it has {', '.join(names)}")
    return needed


def merged_name(engine: str, variant: str) -> str | None:
    """The one file that may stand for all tensors that a variant reads, by its path; None where an engine has none."""
    folder = MERGED_FOLDERS.get(engine)
    return None if folder is None else f"{folder}/{variant}{TENSORS}"
