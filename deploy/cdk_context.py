"""What a deployment can be told: the CDK context, checked before anything is made of it.

Values come from `-c name=value`, which is always text, or from `cdk.json`. Names in lower case that are not known are
refused, so that a typing error is found before the first resource; CDK's own names are not of that form.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from typing import Dict, List, Literal, Optional, Tuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from typing_extensions import Annotated

from container.settings import PREFIX, Settings, SettingsError

Mode = Literal["realtime", "asynchronous"]
REALTIME: Mode = "realtime"
ASYNCHRONOUS: Mode = "asynchronous"
OWN_NAME = re.compile(r"[a-z0-9_]+")
IMAGE = re.compile(
    r"(?P<account>[0-9]{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(\.cn)?/"
    r"(?P<repository>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)(:(?P<tag>\w[\w.-]{0,127})|@(?P<digest>sha256:[0-9a-f]{64}))"
)
WEIGHTS_URI = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(?P<prefix>([A-Za-z0-9!_.'()-]+/)*)")
EMBEDDED, BAKED = "embedded", "baked"
INSTANCE_TYPE = re.compile(r"ml\.(?P<family>[a-z0-9-]+)\.[0-9a-z]+")
# NVIDIA, x86_64, compute capability 7.5 to 9.0: what torch's CUDA 11.8 build has kernels for.
FAMILIES = ("g4dn", "g5", "g6", "g6e", "p4d", "p4de", "p5", "p5e", "p5en")
BLACKWELL = re.compile(r"(g7|p6).*")
STACK_NAME = r"^[A-Za-z]([A-Za-z0-9-]{0,47}[A-Za-z0-9])?$"  # with "-asynchronous" an endpoint's name, at most 63
REALTIME_DEADLINE_S = 55  # the platform ends a call at 60
SET_BY_THE_STACK = {
    f"{PREFIX}{name}"
    for name in (
        "WEIGHTS",
        "BUCKET",
        "KEY_PREFIX",
        "QUEUE_URL",
        "MASK_QUEUE_URL",
        "DEADLINE_S",
        "MAX_IN_FLIGHT",
        "METRICS_NAMESPACE",
        "OUTPUT_DIR",
        "PORT",
    )
}
SECRETS = (f"{PREFIX}LOG_SALT", f"{PREFIX}API_KEYS")
REFERENCE = re.compile(r"\{\{resolve:(secretsmanager|ssm-secure):[^{}]+\}\}")
MAX_VARIABLE_CHARACTERS = 1024  # SageMaker's, for the name and the value of each variable


class PlanError(Exception):
    """A context value is unknown or out of range; the text names it."""


def _listed(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _no_truth(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")  # noqa: TRY004 - pydantic reports ValueError only
    return value


Count = Annotated[int, BeforeValidator(_no_truth)]
Amount = Annotated[float, BeforeValidator(_no_truth)]


class Plan(BaseModel):
    """One deployment's choices.

    Attributes:
        stacks: their names; several are made alike.
        modes: "realtime", "asynchronous", or both: an endpoint each.
        image: repository URI in ECR with tag or digest; None builds the repository's Dockerfile when it is deployed.
        weights: "embedded" (knows drawn figures only), "baked" (in the image), or an S3 prefix that ends in "/".
        instance_type: one with an NVIDIA GPU.
        min_instances: of the real-time endpoint, which cannot go to zero.
        max_instances: of the real-time endpoint.
        asynchronous_min_instances: of the asynchronous endpoint; 0 stops paying between jobs.
        asynchronous_max_instances: of the asynchronous endpoint.
        concurrent_requests_target: requests in flight per instance above which the real-time endpoint grows.
        backlog_target: jobs queued or running per instance above which the asynchronous endpoint grows.
        max_in_flight: requests that one container admits, running and waiting.
        asynchronous_deadline_s: seconds for one job, once it is read from S3.
        asynchronous_days: days after which requests and answers of asynchronous jobs expire; results stay.
        health_check_timeout_s: from the start of a container to its first good ping, 60-3600.
        download_timeout_s: for the weights of an instance, 60-3600.
        inference_ami: driver and container toolkit of the instances.
        encrypt_volume: KMS key on the endpoint configuration; instances with local NVMe may refuse it.
        vpc_id: an existing VPC; with it, subnet_ids.
        subnet_ids: at least two, with a way to the image hosts.
        network_isolation: refused: the service fetches URLs.
        key_prefix: before every key of a result, "" or a path that ends in "/".
        alarm_email: gets the alarms, once the address is confirmed.
        settings: further VTON_ variables of the container; secrets as {{resolve:secretsmanager:...}} only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stacks: Annotated[Tuple[Annotated[str, Field(pattern=STACK_NAME)], ...], BeforeValidator(_listed)] = ("vton",)
    modes: Annotated[Tuple[Mode, ...], BeforeValidator(_listed)] = (REALTIME,)
    image: Optional[str] = None
    weights: str = EMBEDDED
    instance_type: str = "ml.g5.xlarge"
    min_instances: Count = Field(default=2, ge=0, le=1000)
    max_instances: Count = Field(default=4, ge=1, le=1000)
    asynchronous_min_instances: Count = Field(default=0, ge=0, le=1000)
    asynchronous_max_instances: Count = Field(default=2, ge=1, le=1000)
    concurrent_requests_target: Amount = Field(default=2, gt=0, le=1000, allow_inf_nan=False)
    backlog_target: Amount = Field(default=4, gt=0, le=10_000, allow_inf_nan=False)
    max_in_flight: Count = Field(default=8, ge=1, le=1000)
    asynchronous_deadline_s: Count = Field(default=840, ge=1, le=3540)
    asynchronous_days: Count = Field(default=7, ge=1, le=3650)
    health_check_timeout_s: Count = Field(default=900, ge=60, le=3600)
    download_timeout_s: Count = Field(default=1200, ge=60, le=3600)
    inference_ami: Literal[
        "al2-ami-sagemaker-inference-gpu-2",
        "al2-ami-sagemaker-inference-gpu-2-1",
        "al2-ami-sagemaker-inference-gpu-3-1",
        "al2023-ami-sagemaker-inference-gpu-4-1",
    ] = "al2-ami-sagemaker-inference-gpu-3-1"
    encrypt_volume: bool = False
    vpc_id: Optional[str] = Field(default=None, pattern=r"^vpc-[0-9a-f]{8,17}$")
    subnet_ids: Annotated[
        Tuple[Annotated[str, Field(pattern=r"^subnet-[0-9a-f]{8,17}$")], ...], BeforeValidator(_listed)
    ] = Field(default=(), max_length=16)
    network_isolation: bool = False
    key_prefix: str = Field(default="", pattern=r"^([A-Za-z0-9_-]+/)*$")
    alarm_email: Optional[str] = Field(default=None, pattern=r"^[^@\s]+@[^@\s]+\.[^@\s]+$")
    settings: Dict[str, str] = Field(default_factory=dict)

    @field_validator("stacks", "modes")
    @classmethod
    def _different(cls, names: Tuple[str, ...]) -> Tuple[str, ...]:
        if not names or len(set(names)) < len(names):
            raise ValueError("must name at least one, and none twice")
        return names

    @field_validator("min_instances")
    @classmethod
    def _is_not_zero(cls, instances: int) -> int:
        if instances == 0:
            raise ValueError(
                "must be at least 1: a real-time endpoint cannot go to zero (asynchronous_min_instances can)"
            )
        return instances

    @field_validator("image")
    @classmethod
    def _is_in_ecr(cls, image: Optional[str]) -> Optional[str]:
        if image is not None and not IMAGE.fullmatch(image):
            raise ValueError("must be a repository of ECR with :tag or @sha256:digest; SageMaker takes no other")
        return image

    @field_validator("weights")
    @classmethod
    def _are_somewhere(cls, weights: str) -> str:
        if weights in (EMBEDDED, BAKED) or WEIGHTS_URI.fullmatch(weights):
            return weights
        if weights.startswith("s3://") and not weights.endswith("/"):
            raise ValueError('must end in "/": it is the prefix of the files, not an object')
        raise ValueError(f'must be "{EMBEDDED}", "{BAKED}" or s3://bucket/prefix/')

    @field_validator("instance_type")
    @classmethod
    def _has_a_gpu_that_torch_knows(cls, instance_type: str) -> str:
        match = INSTANCE_TYPE.fullmatch(instance_type)
        if match is None:
            raise ValueError("must look like ml.g5.xlarge")
        if BLACKWELL.fullmatch(match["family"]):
            raise ValueError("is a Blackwell GPU, for which torch's CUDA 11.8 build has no kernels")
        if match["family"] not in FAMILIES:
            raise ValueError(f"must be of a family with a GPU that is known to work: {', '.join(FAMILIES)}")
        return instance_type

    @field_validator("network_isolation")
    @classmethod
    def _reaches_the_network(cls, isolated: bool) -> bool:
        if isolated:
            raise ValueError("cannot be had: the service fetches URLs and writes to S3, and isolation forbids both")
        return isolated

    @field_validator("settings", mode="before")
    @classmethod
    def _as_variables(cls, settings: object) -> object:
        if isinstance(settings, str):
            try:
                settings = json.loads(settings)
            except ValueError as exc:
                raise ValueError("must be a JSON object of VTON_ variables") from exc
        if not isinstance(settings, dict):
            raise ValueError("must be a JSON object of VTON_ variables")  # noqa: TRY004 - as above
        if not all(isinstance(value, (str, int, float)) for value in settings.values()):
            raise ValueError("must have texts, numbers or truth values; a list is text with commas")
        return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in settings.items()}

    @field_validator("settings")
    @classmethod
    def _may_be_set_here(cls, settings: Dict[str, str]) -> Dict[str, str]:
        for name, value in settings.items():
            if not name.startswith(PREFIX):
                raise ValueError(f"{name} is no VTON_ variable")
            if name in SET_BY_THE_STACK:
                raise ValueError(f"{name} is set by the stack")
            if name in SECRETS and not REFERENCE.fullmatch(value):
                raise ValueError(f"{name} is a secret: give it as {{{{resolve:secretsmanager:...}}}}")
            if len(value) > MAX_VARIABLE_CHARACTERS:
                raise ValueError(f"{name} is longer than the {MAX_VARIABLE_CHARACTERS} characters that SageMaker takes")
        return settings

    @model_validator(mode="after")
    def _fits_together(self) -> Plan:
        for least, most in (
            ("min_instances", "max_instances"),
            ("asynchronous_min_instances", "asynchronous_max_instances"),
        ):
            if getattr(self, least) > getattr(self, most):
                raise ValueError(f"{least} is above {most}")
        if (self.vpc_id is None) != (not self.subnet_ids):
            raise ValueError("vpc_id and subnet_ids belong together")
        if len(set(self.subnet_ids)) == 1:
            raise ValueError("subnet_ids needs at least two, in different zones")
        return self

    @model_validator(mode="after")
    def _the_container_will_start(self) -> Plan:
        for mode in self.modes:
            try:
                Settings.from_env({**self.variables(mode), f"{PREFIX}METRICS_NAMESPACE": "vton"})
            except SettingsError as exc:
                raise ValueError(f"settings: the container would refuse {exc}") from exc
        return self

    def variables(self, mode: Mode) -> Dict[str, str]:
        """The container's variables as far as they are known before anything is deployed."""
        own = {
            f"{PREFIX}DEADLINE_S": str(REALTIME_DEADLINE_S if mode == REALTIME else self.asynchronous_deadline_s),
            f"{PREFIX}MAX_IN_FLIGHT": str(self.max_in_flight),
        }
        if self.key_prefix:
            own[f"{PREFIX}KEY_PREFIX"] = self.key_prefix
        if self.weights != BAKED:
            own[f"{PREFIX}WEIGHTS"] = EMBEDDED if self.weights == EMBEDDED else "/opt/ml/model"
        return {**own, **self.settings}

    def instances(self, mode: Mode) -> Tuple[int, int]:
        """The least and the most instances of an endpoint."""
        if mode == REALTIME:
            return self.min_instances, self.max_instances
        return self.asynchronous_min_instances, self.asynchronous_max_instances

    @classmethod
    def from_context(cls, context: Mapping[str, object]) -> Plan:
        """The deployment that this CDK context describes.

        Raises:
            PlanError: a value is unknown or out of range; the text names it.
        """
        own = {name: value for name, value in context.items() if OWN_NAME.fullmatch(name)}
        unknown = sorted(own.keys() - cls.model_fields.keys())
        if unknown:
            close = difflib.get_close_matches(unknown[0], cls.model_fields, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise PlanError(f"unknown context value {', '.join(unknown)}{hint}")
        try:
            return cls.model_validate(own)
        except ValidationError as exc:
            raise PlanError("; ".join(_sentences(exc))) from exc


def _sentences(exc: ValidationError) -> List[str]:
    sentences = []
    for error in exc.errors(include_url=False, include_input=False):
        message = error["msg"].removeprefix("Value error, ")
        sentences.append(f"{error['loc'][0]}: {message}" if error["loc"] else message)
    return sentences
