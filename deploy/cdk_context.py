"""What a deployment can be told: the CDK context, checked before anything is made of it.

Values come from `-c name=value`, which is always text, or from `cdk.json`. Names that are not known are refused, so
that a typing error is found before the first resource; all but two of CDK's own have ":", "@" or "/" in them.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
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

from container.settings import PREFIX
from deploy.cdk_settings import as_variables, refuse_unfit, require_a_start

Mode = Literal["realtime", "asynchronous"]
REALTIME: Mode = "realtime"
ASYNCHRONOUS: Mode = "asynchronous"
OWN_NAME = re.compile(r"[^:@/]*")
NAMES_OF_CDK = ("acknowledged-issue-numbers", "cli-telemetry")  # its command line keeps them in cdk.context.json
DOCKERFILE = Path(__file__).resolve().parent.parent / "Dockerfile"
JOBS = "asynchronous/"  # requests and answers of asynchronous jobs, all of which expire
IMAGE = re.compile(
    r"(?P<account>[0-9]{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(\.cn)?/"
    r"(?P<repository>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)(:(?P<tag>\w[\w.-]{0,127})|@(?P<digest>sha256:[0-9a-f]{64}))"
)
WEIGHTS_URI = re.compile(
    r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(?P<prefix>((?!\.{1,2}/)[A-Za-z0-9!_.'()-]+/)+)"
)
EMBEDDED, BAKED = "embedded", "baked"
# One NVIDIA GPU, for the service is one process on one, and the limit of the alarm on its memory counts one. x86_64, of
# compute capability 7.5 to 9.0: what torch's CUDA 11.8 build has kernels for.
INSTANCE_TYPE = re.compile(r"ml\.((g4dn|g5|g6|g6e)\.(2|4|8|16)?xlarge|p5\.4xlarge)")
LOOKS_LIKE_ONE = re.compile(r"ml\.(?P<family>[a-z0-9-]+)\.[0-9a-z]+")
BLACKWELL = re.compile(r"(g7|p6).*")
STACK_NAME = r"^[A-Za-z]([A-Za-z0-9-]{0,47}[A-Za-z0-9])?$"  # with "-asynchronous" an endpoint's name, at most 63
QUEUE_ARN = r"^arn:aws[a-z-]*:sqs:[a-z0-9-]+:[0-9]{12}:[A-Za-z0-9_-]{1,80}$"  # no ".fifo": messages name no group
REALTIME_DEADLINE_S = 55  # the platform ends a call at 60
# A job that timed out keeps its place until its picture is finished, while the platform sends the next at once. Without
# a place that would get 429, with which an asynchronous job fails for good.
PLACES_PER_JOB = 2
ANYWHERE = "0.0.0.0/0"
MAX_RULES = 60  # of a security group, unless EC2's quota is raised


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
        max_in_flight: requests that a real-time container admits, running and waiting; jobs that an asynchronous one is
            given at a time.
        asynchronous_deadline_s: seconds for one job, once it is read from S3.
        asynchronous_days: days after which answers of asynchronous jobs expire; requests do after one, results stay.
        health_check_timeout_s: from the start of a container to its first good ping, 60-3600.
        download_timeout_s: for the weights of an instance, 60-3600.
        inference_ami: driver and container toolkit of the instances.
        encrypt_volume: KMS key on the endpoint configuration; instances with local NVMe may refuse it.
        vpc_id: an existing VPC; with it, subnet_ids.
        subnet_ids: at least two, with a way to the image hosts.
        egress_cidrs: networks, IPv4 or IPv6, that are reached from the VPC, by https alone.
        network_isolation: refused: the service fetches URLs.
        key_prefix: before every key of a result, "" or a path that ends in "/".
        bucket: name of an existing one for the pictures and the jobs; None makes one.
        queue_arn: of an existing queue for the messages of pictures; None makes one.
        mask_queue_arn: of an existing queue for the messages of masks; None makes one.
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
    max_in_flight: Count = Field(default=8, ge=1, le=1000 // PLACES_PER_JOB)
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
    egress_cidrs: Annotated[Tuple[str, ...], BeforeValidator(_listed)] = Field(
        default=(ANYWHERE,), max_length=MAX_RULES
    )
    network_isolation: bool = False
    key_prefix: str = Field(default="", pattern=r"^([A-Za-z0-9_-]+/)*$")
    bucket: Optional[str] = Field(default=None, pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
    queue_arn: Optional[str] = Field(default=None, pattern=QUEUE_ARN)
    mask_queue_arn: Optional[str] = Field(default=None, pattern=QUEUE_ARN)
    alarm_email: Optional[str] = Field(default=None, pattern=r"^[^@\s]+@[^@\s]+\.[^@\s]+$")
    settings: Dict[str, str] = Field(default_factory=dict)

    @field_validator("stacks", "modes")
    @classmethod
    def _different(cls, names: Tuple[str, ...]) -> Tuple[str, ...]:
        if not names or len({name.lower() for name in names}) < len(names):
            raise ValueError("must name at least one, and none twice, in whatever case")
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
        match = LOOKS_LIKE_ONE.fullmatch(instance_type)
        if match is None:
            raise ValueError("must look like ml.g5.xlarge")
        if BLACKWELL.fullmatch(match["family"]):
            raise ValueError("is a Blackwell GPU, for which torch's CUDA 11.8 build has no kernels")
        if not INSTANCE_TYPE.fullmatch(instance_type):
            raise ValueError(
                "must have exactly one GPU, of a kind that is known to work: g4dn, g5, g6 or g6e "
                "as xlarge, 2xlarge, 4xlarge, 8xlarge or 16xlarge, or ml.p5.4xlarge"
            )
        return instance_type

    @field_validator("key_prefix")
    @classmethod
    def _stays(cls, key_prefix: str) -> str:
        if key_prefix.startswith(JOBS):
            raise ValueError(f"must not begin with {JOBS}: what lies there expires")
        return key_prefix

    @field_validator("subnet_ids", "egress_cidrs")
    @classmethod
    def _none_twice(cls, names: Tuple[str, ...]) -> Tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError("must name none twice")
        return names

    @field_validator("egress_cidrs")
    @classmethod
    def _are_networks(cls, cidrs: Tuple[str, ...]) -> Tuple[str, ...]:
        if not cidrs:
            raise ValueError("must name at least one: the service fetches URLs and writes to S3")
        for cidr in cidrs:
            network = str(ipaddress.ip_network(cidr))
            if cidr != network:
                raise ValueError(f"must have {network} instead of {cidr}, the one way to write it")
        return cidrs

    @field_validator("network_isolation")
    @classmethod
    def _reaches_the_network(cls, isolated: bool) -> bool:
        if isolated:
            raise ValueError("cannot be had: the service fetches URLs and writes to S3, and isolation forbids both")
        return isolated

    @field_validator("settings", mode="before")
    @classmethod
    def _as_variables(cls, settings: object) -> object:
        return as_variables(settings)

    @field_validator("settings")
    @classmethod
    def _may_be_set_here(cls, settings: Dict[str, str]) -> Dict[str, str]:
        refuse_unfit(settings)
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
        if len(self.subnet_ids) == 1:
            raise ValueError("subnet_ids needs at least two, in different zones")
        if self.vpc_id is None and self.egress_cidrs != (ANYWHERE,):
            raise ValueError("egress_cidrs needs vpc_id")
        if self.weights == BAKED and self.image is None:
            raise ValueError(f"weights {BAKED} needs image, one that carries them: a build of the target {BAKED}")
        if self.image is None and not DOCKERFILE.exists():
            raise ValueError("image must be named where the package is installed: the Dockerfile is in the repository")
        return self

    @model_validator(mode="after")
    def _the_container_will_start(self) -> Plan:
        for mode in self.modes:
            require_a_start({**self.variables(mode), f"{PREFIX}METRICS_NAMESPACE": "vton"})
        return self

    def variables(self, mode: Mode) -> Dict[str, str]:
        """The container's variables as far as they are known before anything is deployed."""
        deadline_s, places = REALTIME_DEADLINE_S, self.max_in_flight
        if mode == ASYNCHRONOUS:
            deadline_s, places = self.asynchronous_deadline_s, PLACES_PER_JOB * self.max_in_flight
        own = {f"{PREFIX}DEADLINE_S": str(deadline_s), f"{PREFIX}MAX_IN_FLIGHT": str(places)}
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
        own = {name: context[name] for name in context if OWN_NAME.fullmatch(name) and name not in NAMES_OF_CDK}
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
