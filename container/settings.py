"""Everything that can be set, read once from the environment.

Every name is `VTON_<FIELD>`; an unknown `VTON_` name refuses the start, so that a typing error is found before the
first request. `NUM_STEP` is the deployed system's name for `VTON_STEPS` and still read. boto3 reads its own variables.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, Dict, List, Literal, Mapping, Optional, Tuple

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from typing_extensions import Annotated

from model.interface import EMBEDDED

PREFIX = "VTON_"
DEFAULT_PORT = 8080  # SageMaker's
MAX_PORT = 65535
ALL_INTERFACES = "0.0.0.0"  # noqa: S104 - the platform reaches a container from outside
HOST = re.compile(r"(\*\.)?[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:(?P<port>[0-9]{1,5}))?")
OTHER_NAMES = {"steps": "NUM_STEP", "port": "SAGEMAKER_BIND_TO_PORT"}  # read where the VTON_ name is not set
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

Port = Annotated[int, Field(ge=1, le=MAX_PORT)]


class SettingsError(Exception):
    """A setting is unknown or out of range; the text names the variable."""


class Settings(BaseModel):
    """One process's settings.

    Attributes:
        weights: "embedded" or a directory of weights; the container image sets /opt/ml/model.
        engine: which engine makes the pictures.
        variant: which of the engine's published weights.
        device: "auto", "cuda" or "cpu".
        dtype: "auto", "float16", "bfloat16" or "float32".
        tf32: allow TF32 on CUDA.
        compile: "off", "inductor" (fused kernels) or "graphs" (the same as CUDA graphs): faster steps for a start that
            takes minutes longer, or finds its cache.
        memory: "normal", or "small" for cards of 6 GB: slower, with faint seams.
        garment_join: how top and bottom become one garment: "clean" (one width, white) or "legacy" (as deployed
            before: unscaled, black beside the narrower one).
        bucket: S3 bucket of the results.
        key_prefix: what every key begins with, "" or a path that ends in "/".
        queue_url: SQS queue of the completion messages; without one none are sent.
        output_dir: keep results in this directory instead of S3.
        mask_queue_url: SQS queue for the messages of mask requests; without one they go to queue_url.
        masker: "embedded", "schp" (the published parsers beside the weights), "off", or "auto": what fits the weights.
        steps: denoising steps where the request names none, 1-100.
        guidance: guidance scale where the request names none, 1-10.
        quality: "exact", "balanced" or "fast" where the request says none: what is traded for speed.
        deadline_s: seconds from admission to answer, 1-3600; real-time endpoints end at 60.
        max_in_flight: requests admitted at a time, running and waiting.
        max_batch: pictures made at once, 1-16, where so many compatible requests wait.
        image_hosts: if any, the only public hosts that images come from ("shop.example", "*.shop.example").
        trusted_hosts: "host:port" that may be private and plain http. For local work only.
        docs: serve the OpenAPI pages.
        rest: open the REST door as well.
        api_keys: if any, what callers must show, 16 characters at least each; on SageMaker IAM does that.
        rate_limit: how often one caller may ask ("60/minute"); by key, else by address.
        cors_origins: pages of these origins ("https://shop.example") may call the REST door.
        width, height: px of what the model makes, in steps of 64, 256-2048; the published weights know 768x1024.
        host: address to listen on.
        port: where to listen.
        log_salt: secret with which user ids are hashed for the log; the same on all instances of an endpoint.
        log_level: the least severe level that is logged.
        metrics_namespace: CloudWatch namespace of the metrics that ride on the log lines; without one none do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: str = Field(default=EMBEDDED, min_length=1)
    engine: str = "catvton"
    variant: str = "mix"
    device: Literal["auto", "cuda", "cpu"] = "auto"
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    tf32: bool = True
    compile: Literal["off", "inductor", "graphs"] = "off"
    memory: Literal["normal", "small"] = "normal"
    garment_join: Literal["clean", "legacy"] = "clean"
    bucket: Optional[str] = Field(default=None, pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
    key_prefix: str = Field(default="", pattern=r"^([A-Za-z0-9_-]+/)*$")
    queue_url: Optional[str] = Field(default=None, pattern=r"^https?://[^\s]+$")
    mask_queue_url: Optional[str] = Field(default=None, pattern=r"^https?://[^\s]+$")
    masker: Literal["auto", "embedded", "schp", "off"] = "auto"
    output_dir: Optional[Path] = None
    steps: int = Field(default=50, ge=1, le=100)
    guidance: float = Field(default=2.5, ge=1, le=10, allow_inf_nan=False)
    quality: Literal["exact", "balanced", "fast"] = "exact"
    deadline_s: float = Field(default=55, ge=1, le=3600, allow_inf_nan=False)
    max_in_flight: int = Field(default=8, ge=1, le=1000)
    max_batch: int = Field(default=1, ge=1, le=16)
    image_hosts: Tuple[str, ...] = ()
    trusted_hosts: Tuple[str, ...] = ()
    docs: bool = False
    rest: bool = False
    api_keys: Tuple[Annotated[SecretStr, Field(min_length=16)], ...] = ()
    rate_limit: Optional[str] = Field(default=None, pattern=r"^[1-9][0-9]{0,8}/(second|minute|hour|day)$")
    cors_origins: Tuple[Annotated[str, Field(pattern=r"^https?://[a-z0-9.-]+(:[0-9]{1,5})?$")], ...] = ()
    width: int = Field(default=768, ge=256, le=2048, multiple_of=64)
    height: int = Field(default=1024, ge=256, le=2048, multiple_of=64)
    host: str = Field(default=ALL_INTERFACES, pattern=r"^[A-Za-z0-9.:-]{1,253}$")
    port: Port = DEFAULT_PORT
    log_salt: Optional[SecretStr] = Field(default=None, min_length=16)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    metrics_namespace: Optional[str] = Field(default=None, pattern=r"^[A-Za-z0-9._#:/-]{1,255}$")

    @field_validator("image_hosts", "trusted_hosts", mode="before")
    @classmethod
    def _hosts(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        hosts = tuple(host.strip().lower() for host in value.split(",") if host.strip())
        wrong = [host for host in hosts if not _is_host(host)]
        if wrong:
            raise ValueError("must be a comma-separated list of hosts, each with an optional :port")
        return hosts

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("trusted_hosts")
    @classmethod
    def _ports_are_named(cls, hosts: Tuple[str, ...]) -> Tuple[str, ...]:
        if any(":" not in host or "*" in host for host in hosts):
            raise ValueError("must be a comma-separated list of host:port")
        return hosts

    @model_validator(mode="after")
    def _lines_with_metrics_are_written(self) -> Settings:
        if self.metrics_namespace is None:
            return self
        if self.metrics_namespace.startswith("AWS/"):
            raise ValueError("VTON_METRICS_NAMESPACE must not begin with AWS/, which is Amazon's own")
        if self.log_level not in ("DEBUG", "INFO"):
            raise ValueError("VTON_METRICS_NAMESPACE needs VTON_LOG_LEVEL INFO or DEBUG: metrics ride on such lines")
        return self

    @model_validator(mode="after")
    def _what_is_compiled_stays_on_the_card(self) -> Settings:
        if self.memory == "small" and self.compile != "off":
            raise ValueError("VTON_MEMORY small and VTON_COMPILE exclude each other")
        return self

    @model_validator(mode="after")
    def _one_place_for_results(self) -> Settings:
        if self.bucket is not None and self.output_dir is not None:
            raise ValueError("VTON_BUCKET and VTON_OUTPUT_DIR exclude each other")
        return self

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """The settings that these variables describe.

        Raises:
            SettingsError: a VTON_ name is unknown or a value out of range; the text names the variable and the range.
        """
        fields = {PREFIX + name.upper(): name for name in cls.model_fields}
        unknown = sorted(name for name in environ if name.startswith(PREFIX) and name not in fields)
        if unknown:
            raise SettingsError(f"unknown setting {', '.join(unknown)}")
        values: Dict[str, Any] = {fields[name]: value for name, value in environ.items() if name in fields}
        for name, variable in OTHER_NAMES.items():
            if environ.get(variable):
                values.setdefault(name, environ[variable])
        if environ.get("SAGEMAKER_CONTAINER_LOG_LEVEL"):
            values.setdefault("log_level", _level_name(environ["SAGEMAKER_CONTAINER_LOG_LEVEL"]))
        try:
            return cls.model_validate(values)
        except ValidationError as exc:
            raise SettingsError("; ".join(_sentences(exc, environ))) from exc

    def require_a_place_for_results(self) -> Settings:
        """These settings, if they say where pictures are kept.

        Raises:
            SettingsError: neither a bucket nor a directory is set.
        """
        if self.bucket is None and self.output_dir is None:
            raise SettingsError("set VTON_BUCKET (an S3 bucket) or VTON_OUTPUT_DIR (a local directory) for the results")
        return self


def _is_host(host: str) -> bool:
    match = HOST.fullmatch(host)
    return match is not None and (match["port"] is None or 1 <= int(match["port"]) <= MAX_PORT)


def _level_name(level: str) -> str:
    """ "INFO" for "info" and for "20": SageMaker's SDK sends numbers."""
    name = logging.getLevelName(int(level)) if level.isdecimal() else level.upper()
    if name not in LOG_LEVELS:
        raise SettingsError(f"SAGEMAKER_CONTAINER_LOG_LEVEL must be one of {', '.join(LOG_LEVELS)} or their numbers")
    return str(name)


def _sentences(exc: ValidationError, environ: Mapping[str, str]) -> List[str]:
    """One sentence per wrong variable, without its value (it may be a secret in the wrong place)."""
    sentences = []
    for error in exc.errors(include_url=False, include_input=False):
        message = error["msg"].removeprefix("Value error, ")
        field = str(error["loc"][0]) if error["loc"] else ""
        name = PREFIX + field.upper() if field else ""
        if name not in environ:
            name = OTHER_NAMES.get(field, name)
        sentences.append(f"{name}: {message}" if name else message)
    return sentences
