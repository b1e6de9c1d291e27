"""What a caller may ask for, what it gets, and the identity of a job."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Callable, Dict, List, Literal, Mapping, Optional, Tuple, Type, TypeVar, Union, get_args
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from typing_extensions import Annotated

from container.errors import InvalidRequest
from model.interface import EXACT, FAST, FAST_STEPS

DEFAULT_SEED = 42  # the deployed system's
RANDOM_SEED = -1
MAX_SEED = 2**63 - 1
MAX_URL_CHARACTERS = 2048

# A presigned URL is new for every call though it names the same picture: its signature is no part of a job's identity.
SIGNATURE_PREFIXES = ("x-amz-", "x-goog-")
SIGNATURE_PARAMETERS = frozenset({"awsaccesskeyid", "googleaccessid", "signature", "expires", "policy", "key-pair-id"})
SIGNERS = frozenset({"awsaccesskeyid", "googleaccessid", "key-pair-id"})  # with one, the other names are a signature's

Identifier = Annotated[str, StringConstraints(pattern=r"\A[A-Za-z0-9][A-Za-z0-9_-]{0,63}\z")]
Url = Annotated[str, StringConstraints(min_length=1, max_length=MAX_URL_CHARACTERS)]
ClothType = Literal["upper", "lower", "overall", "inner", "outer"]
CLOTH_TYPES: Tuple[ClothType, ...] = get_args(ClothType)
MASK_TASK = "mask"
Quality = Literal["exact", "balanced", "fast"]

GARMENT_FIELDS = {"upper_cloth_url", "lower_cloth_url", "overall_cloth_url"}
GARMENTS_OF: Dict[str, Tuple[str, ...]] = {
    "upper": ("upper_cloth_url",),
    "inner": ("upper_cloth_url",),
    "outer": ("upper_cloth_url",),
    "lower": ("lower_cloth_url",),
    "overall": ("upper_cloth_url", "lower_cloth_url"),
}


class TryOnRequest(BaseModel):
    """One try-on, as asked for: strict, nothing coerced, unknown fields refused.

    URLs are only measured here; whether one may be fetched is `fetch`'s to say.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    person_image_url: Url
    upper_cloth_url: Optional[Url] = None
    lower_cloth_url: Optional[Url] = None
    overall_cloth_url: Optional[Url] = None
    mask_image_url: Optional[Url] = None
    cloth_type: ClothType = "overall"
    userId: Identifier
    timestamp: Identifier
    num_inference_steps: Optional[int] = Field(default=None, ge=1, le=100)
    guidance_scale: Optional[float] = Field(default=None, ge=1, le=10, allow_inf_nan=False)
    seed: int = Field(default=DEFAULT_SEED, ge=RANDOM_SEED, le=MAX_SEED)
    composite: Literal["repaint", "none"] = "repaint"
    output_size: Literal["model", "person"] = "model"
    output_format: Literal["jpeg", "png", "webp"] = "jpeg"
    output_quality: int = Field(default=95, ge=1, le=100)
    quality: Optional[Quality] = None
    task: Literal["try_on"] = "try_on"

    @model_validator(mode="after")
    def _garments_fit_the_cloth_type(self) -> TryOnRequest:
        full = self.cloth_type == "overall" and self.overall_cloth_url is not None
        if full and (self.upper_cloth_url is not None or self.lower_cloth_url is not None):
            raise PydanticCustomError("garment", "{name}", {"name": "overall_cloth_url"})
        for name in () if full else GARMENTS_OF[self.cloth_type]:
            if getattr(self, name) is None:
                raise PydanticCustomError("garment", "{name}", {"name": name})
        return self

    def garment_urls(self) -> Tuple[str, ...]:
        """The one garment, or top and bottom, that this cloth type uses."""
        if self.cloth_type == "overall" and self.overall_cloth_url is not None:
            return (self.overall_cloth_url,)
        return tuple(getattr(self, name) for name in GARMENTS_OF[self.cloth_type])

    def with_defaults(self, *, steps: int, guidance: float, quality: Quality = EXACT) -> TryOnRequest:
        """The same request with the settings' defaults in the places that the caller left open.

        The fast quality takes at most `FAST_STEPS`, unless the caller says how many.
        """
        quality = self.quality or quality
        steps = min(steps, FAST_STEPS) if quality == FAST else steps
        defaults = {"num_inference_steps": steps, "guidance_scale": guidance, "quality": quality}
        open_places = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return self.model_copy(update=open_places)

    def job_id(self) -> str:
        """sha256 (64 hex digits) of the canonical inputs: the same pictures and numbers give the same id."""
        inputs = self.model_dump(exclude_defaults=True, exclude=GARMENT_FIELDS)
        if self.quality == EXACT:  # the same job as before there were others
            del inputs["quality"]
        inputs["garments"] = [_unsigned(url) for url in self.garment_urls()]
        inputs["person_image_url"] = _unsigned(self.person_image_url)
        if self.mask_image_url is not None:
            inputs["mask_image_url"] = _unsigned(self.mask_image_url)
        return _digest(inputs)


class MaskRequest(BaseModel):
    """The masks of one photo, as asked for: strict, and by the names of the deployed mask function as well."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    person_image_url: Url = Field(validation_alias=AliasChoices("person_image_url", "row_image_url"))
    userId: Identifier = Field(validation_alias=AliasChoices("userId", "username"))
    timestamp: Identifier
    cloth_types: List[ClothType] = Field(default=list(CLOTH_TYPES), min_length=1, max_length=len(CLOTH_TYPES))
    task: Literal["mask"] = "mask"

    @field_validator("cloth_types")
    @classmethod
    def _each_once(cls, value: List[str]) -> List[str]:
        if len(set(value)) < len(value):
            raise PydanticCustomError("repeated", "a type is named twice")
        return value

    def job_id(self) -> str:
        """sha256 (64 hex digits) of what decides the masks; another choice of types is no other job."""
        inputs = self.model_dump(exclude={"cloth_types"})
        inputs["person_image_url"] = _unsigned(self.person_image_url)
        return _digest(inputs)


AnyRequest = Union[TryOnRequest, MaskRequest]
_Request = TypeVar("_Request", TryOnRequest, MaskRequest)


OnStep = Callable[[int, int], None]


def ignore(_done: int, _steps: int) -> None:
    """For steps that nobody is told of."""


@dataclass(frozen=True)
class CallContext:
    """What comes with a call, beside its fields.

    Attributes:
        request_id: for the log and for errors.
        inference_id, custom_attributes: what the platform was told, if anything.
        is_wanted: turns False when the caller has left.
        on_step: told (steps done, steps in all) after each denoising step, on the worker's thread; must not raise.
        uploads: the files that came with the call, by the references (`upload_reference`) that its fields name.
    """

    request_id: str
    inference_id: Optional[str] = None
    custom_attributes: Optional[str] = None
    is_wanted: Callable[[], bool] = lambda: True
    on_step: OnStep = ignore
    uploads: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class TryOnResult:
    """The answer to a try-on."""

    object_key: str
    bucket: Optional[str]
    s3_uri: Optional[str]
    etag: str
    job_id: str
    seed: int
    width: int
    height: int
    engine: str
    mask_source: str
    mask_cache: Optional[str]
    timings_ms: Mapping[str, float]
    message: str = "VTON run successfully"


@dataclass(frozen=True)
class MaskResult:
    """The answer to a mask request; `object_keys` has a key per type."""

    object_keys: Mapping[str, str]
    bucket: Optional[str]
    job_id: str
    width: int
    height: int
    mask_source: str
    mask_cache: Optional[str]
    timings_ms: Mapping[str, float]
    message: str = "Masks made successfully"


AnyResult = Union[TryOnResult, MaskResult]


def upload_reference(content: bytes) -> str:
    """What stands in a field for a file that came with the call: the same bytes make the same job."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def answer(result: AnyResult) -> Dict[str, Any]:
    """The members of an answer's JSON; `mask_cache` is one only where a photo was masked ("hit" or "miss")."""
    members = asdict(result)
    if members["mask_cache"] is None:
        del members["mask_cache"]
    return members


def parse(fields: object) -> AnyRequest:
    """A request out of decoded JSON.

    What the deployed system sends its mask function, `{"body": {"username", "row_image_url", "timestamp"}}`, is a mask
    request too.

    Raises:
        InvalidRequest: with the first field at fault; the input itself is never echoed.
    """
    if not isinstance(fields, dict):
        raise InvalidRequest("the body is not a JSON object")
    event = fields.get("body")
    if len(fields) == 1 and isinstance(event, dict):
        fields = {"task": MASK_TASK, **event}
    if fields.get("task") == MASK_TASK:
        return _validated(MaskRequest, fields)
    return _validated(TryOnRequest, fields)


def parse_try_on(fields: Mapping[str, object]) -> TryOnRequest:
    """A try-on out of fields.

    Raises:
        InvalidRequest: as `parse`.
    """
    return _validated(TryOnRequest, fields)


def parse_masks(fields: Mapping[str, object]) -> MaskRequest:
    """A mask request out of fields.

    Raises:
        InvalidRequest: as `parse`.
    """
    return _validated(MaskRequest, fields)


def _validated(kind: Type[_Request], fields: Mapping[str, object]) -> _Request:
    try:
        return kind.model_validate(fields)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        name = first["ctx"]["name"] if first["type"] == "garment" else str(first["loc"][0]) if first["loc"] else None
        raise InvalidRequest(f"{first['type']} at {name}"[:200], field=_printable(name) if name else None) from exc


def _digest(inputs: Mapping[str, Any]) -> str:
    canonical = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _printable(name: str) -> Optional[str]:
    """The name of a field, if it is one that could stand in a log or an answer."""
    return name if len(name) <= 64 and name.isascii() and name.isidentifier() else None


def _unsigned(url: str) -> str:
    """The URL without the query parameters that only sign it."""
    try:
        parts = urlsplit(url)
        query = parse_qsl(parts.query, keep_blank_values=True, errors="surrogateescape")
    except ValueError:  # no URL at all: fetching it will be refused
        return url
    names = {name.lower() for name, _ in query}
    signing = SIGNATURE_PARAMETERS if "signature" in names and names & SIGNERS else frozenset()
    kept = [
        (name, value)
        for name, value in query
        if name.lower() not in signing and not name.lower().startswith(SIGNATURE_PREFIXES)
    ]
    return urlunsplit(parts._replace(query=urlencode(kept, errors="surrogateescape")))
