"""`vton local`: SageMaker on this machine."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Callable, NoReturn

import boto3
import click
from boto3.exceptions import PythonDeprecationWarning
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from click.core import ParameterSource
from tqdm import tqdm

from container.telemetry import configure_logging
from deploy.async_job import AsyncConfig
from deploy.local_async import AsyncEndpoint
from deploy.local_batch import (
    Folder,
    LocalFolder,
    S3Folder,
    TransformError,
    TransformOptions,
    prepare,
    transform,
)
from deploy.local_cloud import DIRECTLY, folder_host, http_server, listening, moto_server, reach_this_machine
from deploy.local_container import SERVE, Container, ContainerFailed, Launch
from deploy.local_runtime import ENDPOINT_NAME, RuntimeLimits, create_runtime

REALTIME, ASYNC = "realtime", "async"
OUTPUT = Path("vton_output") / "local"
SERVICES = ("s3", "sqs", "sns")
NAME = "vton-local"  # of the bucket, and what the queues and topics begin with
KEYS = {"AWS_ACCESS_KEY_ID": "local", "AWS_SECRET_ACCESS_KEY": "local", "AWS_DEFAULT_REGION": "eu-central-1"}
US_EAST_1 = "us-east-1"  # the one region that must not be named when a bucket is made
BOUNDED = Config(connect_timeout=5, read_timeout=10, retries={"total_max_attempts": 3})
PLACES = 8
MAX_IN_FLIGHT = 1000  # the largest VTON_MAX_IN_FLIGHT that the container takes
ASYNC_S = 900  # InvocationTimeoutSeconds, unless a call says another
ANSWER_S = 5  # before the platform's limit, so that the container itself says what took too long
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_SIGNAL_S = 0.5  # a shell and a terminal, or `timeout`, send one signal twice
EXIT_FAILED = 1
EXIT_STOPPED = 75  # sysexits: temporary failure
EXIT_SETTINGS = 78  # sysexits: configuration
EXIT_OF_SIGNAL = 128  # and its number, as a shell has it

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


def _words(_context: click.Context, _option: click.Parameter, command: str | None) -> Sequence[str]:
    """The container's command: the user's, as a shell splits it, or the image's own."""
    if command is None:
        return SERVE
    try:
        words = shlex.split(command)
    except ValueError as exc:
        _end(f"--command is not a command line: {exc}")
    return words or _end("--command names no program")


_COMMAND = click.option(
    "--command",
    callback=_words,
    help="What is run as the container; by default this repository's. It gets its settings as environment variables, "
    "listens on SAGEMAKER_BIND_TO_PORT, and ends on SIGTERM.",
)


@dataclass(frozen=True)
class Cloud:
    """What the endpoint has of S3, SQS and SNS."""

    bucket: str
    queue_url: str
    mask_queue_url: str
    outcome_queue_url: str
    success_topic: str
    error_topic: str


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--port", type=click.IntRange(0, 65535), default=8081, show_default=True, help="0 takes a free one.")
@click.option("--endpoint-name", default="vton", show_default=True)
@click.option("--mode", type=click.Choice([REALTIME, ASYNC]), default=REALTIME, show_default=True)
@click.option(
    "--concurrency", type=click.IntRange(1, MAX_IN_FLIGHT), default=PLACES, show_default=True, help="The places."
)
@click.option("--images", type=_FOLDER, help="A folder of pictures to serve to the endpoint.")
@click.option("--output", "-o", type=click.Path(path_type=Path), default=OUTPUT, show_default=True, help="For the log.")
@click.option("--time-limit", type=click.FloatRange(min=0.1), default=60.0, show_default=True, help="Of a call, s.")
@_COMMAND
def local(images: Path | None, output: Path, command: Sequence[str], **options: Any) -> None:  # noqa: ANN401 - click's
    """Run the container behind what boto3 takes for SageMaker, until Ctrl-C, SIGTERM or the terminal's end.

    S3, SQS and SNS are stand-ins too, unless AWS_ENDPOINT_URL or AWS_ENDPOINT_URL_S3, _SQS and _SNS name others. The
    endpoint's own settings come from VTON_ variables.
    """
    context = click.get_current_context()
    if context.invoked_subcommand is not None:
        _refuse_options_of(context)
        return
    if not ENDPOINT_NAME.fullmatch(options["endpoint_name"]):
        _end("the name of an endpoint has letters, digits and hyphens, at most 63")
    with (
        _to_the_end(0) as started,
        closing(listening(options["port"])) as listener,
        _stage(output, images) as (stack, cloud, hosts),
    ):
        given = {"VTON_MAX_IN_FLIGHT": _max_in_flight(options["mode"], options["concurrency"])}
        if options["mode"] == ASYNC:
            given["VTON_DEADLINE_S"] = str(ASYNC_S - ANSWER_S)
        container = _container(output, command, {**given, **_places(cloud), **hosts})
        started.append(container)
        stack.enter_context(container.serving())
        endpoint = create_runtime(
            lambda: container.url,
            name=options["endpoint_name"],
            limits=RuntimeLimits(model_s=options["time_limit"]),
            asynchronous=_asynchronous(cloud, options["concurrency"]) if options["mode"] == ASYNC else None,
        )
        url = stack.enter_context(http_server(endpoint, listener))
        _tell(url, cloud, options, output)
        container.wait_until_failed()


@local.command("transform")
@click.option("--input", "source", required=True, help="A file or folder of JSON Lines, or s3://bucket/prefix.")
@click.option("--output", "target", required=True, help="A folder, or s3://bucket/prefix.")
@click.option(
    "--max-concurrent-transforms", type=int, help="Records at a time; 0 or unset: as many as the container offers."
)
@click.option("--max-payload-mb", type=int, help="Of a record, 1-100; by default what the container offers.")
@click.option("--max-retries", type=click.IntRange(0, 3), default=3, show_default=True)
@click.option("--timeout", "timeout_s", type=click.IntRange(1, 3600), default=600, show_default=True, help="Seconds.")
@click.option("--images", type=_FOLDER, help="A folder of pictures to serve to the container.")
@click.option("--log", "logs", type=click.Path(path_type=Path), default=OUTPUT, show_default=True, help="Folder.")
@_COMMAND
def transform_command(source: str, target: str, logs: Path, command: Sequence[str], **options: Any) -> None:  # noqa: ANN401
    """Make every picture of JSON Lines files, as a Batch Transform job does.

    INPUT.out has the answer to each line of INPUT. The pictures are stored in the bucket; with the stand-in for S3, in
    the output folder.
    """
    in_s3 = source.startswith("s3://") or target.startswith("s3://")
    lasting = _named("s3")
    if not lasting and (in_s3 or "VTON_BUCKET" in os.environ):
        _end("s3:// and VTON_BUCKET need AWS_ENDPOINT_URL_S3: the stand-in for S3 ends with the job")
    with _to_the_end(EXIT_STOPPED) as started, _stage(logs, options.pop("images")) as (stack, cloud, hosts):
        job = prepare(_folder(source), _folder(target), TransformOptions(**options))
        kept = _places(cloud) if lasting else {"VTON_OUTPUT_DIR": str(Path(target).resolve())}
        deadline_s = str(max(1, options["timeout_s"] - ANSWER_S))
        container = _container(logs, command, {"VTON_DEADLINE_S": deadline_s, **kept, **hosts, **job.options.environ()})
        started.append(container)
        stack.enter_context(container.serving())
        bar = stack.enter_context(tqdm(unit="record", disable=not sys.stderr.isatty()))
        result = transform(lambda: container.url, job, bar.update)
    told = {"status": result.status, "records": result.records, "completed": result.completed, "failed": result.failed}
    click.echo(json.dumps(told, indent=2))
    sys.exit(EXIT_FAILED if result.failed else 0)


def _refuse_options_of(context: click.Context) -> None:
    """Options before a command's name are the group's, which then runs nothing that would heed them."""
    given = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        _end(f"{options} would be dropped: options of {context.invoked_subcommand} stand after it")


@contextmanager
def _to_the_end(interrupted: int) -> Iterator[list[Container]]:
    """Turns signals and what cannot be into an exit status, after all that was started has ended.

    Args:
        interrupted: the status where a signal ends it.
    Yields:
        A list for the containers that were started, which a second signal kills.
    """
    configure_logging("INFO")
    warnings.filterwarnings("ignore", category=PythonDeprecationWarning)  # Python 3.9 is what the container runs
    started: list[Container] = []
    _handle_signals(started)
    try:
        yield started
    except KeyboardInterrupt:
        _say("stopped")
        sys.exit(interrupted)
    except (ContainerFailed, TransformError) as exc:
        _end(str(exc))
    except (BotoCoreError, ClientError, RuntimeError, OSError) as exc:
        _end(f"vton local cannot start: {exc}")


@contextmanager
def _stage(output: Path, images: Path | None) -> Iterator[tuple[ExitStack, Cloud, dict[str, str]]]:
    """What stands around the container: the cloud, and the hosts that it may fetch from."""
    output.mkdir(parents=True, exist_ok=True)
    reach_this_machine(os.environ)
    with ExitStack() as stack:
        _choose_services(stack)
        hosts = [host for host in os.environ.get("VTON_TRUSTED_HOSTS", "").split(",") if host]
        if images is not None:
            hosts.append(stack.enter_context(folder_host(images)))
            click.echo(f"pictures of {images} are at http://{hosts[-1]}/")
        hosts.extend(_hosts_of_endpoints())
        yield stack, _cloud(), {"VTON_TRUSTED_HOSTS": ",".join(hosts)}


def _named(service: str) -> bool:
    return bool(os.environ.get(f"AWS_ENDPOINT_URL_{service.upper()}") or os.environ.get("AWS_ENDPOINT_URL"))


def _choose_services(stack: ExitStack) -> None:
    """Names a stand-in for each service that the environment does not, to this process and to all that it starts."""
    missing = [service for service in SERVICES if not _named(service)]
    if not missing:
        return
    url = stack.enter_context(moto_server())
    os.environ.update({f"AWS_ENDPOINT_URL_{service.upper()}": url for service in missing})
    if len(missing) == len(SERVICES):  # nothing here needs keys, and none shall reach a log or a stand-in
        os.environ.update(KEYS)
        for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE"):
            os.environ.pop(name, None)


def _hosts_of_endpoints() -> list[str]:
    """The host:port of S3, for presigned URLs, where it is on this machine."""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    host = url.partition("://")[2].partition("/")[0]
    return [host] if url.startswith("http://") and ":" in host else []


def _client(service: str) -> Any:  # noqa: ANN401 - boto3 clients are typed by literal names only
    make: Callable[..., Any] = boto3.client
    try:
        return make(service, config=BOUNDED)
    except BotoCoreError:
        raise
    except ValueError as exc:  # botocore's for what is no URL
        name = f"AWS_ENDPOINT_URL_{service.upper()}"
        _end(f"{name if os.environ.get(name) else 'AWS_ENDPOINT_URL'} is not a URL: {exc}")


def _cloud() -> Cloud:
    """The bucket, queues and topics, made where they are not there."""
    bucket = os.environ.get("VTON_BUCKET") or NAME
    s3, sqs, sns = (_client(service) for service in SERVICES)
    region = s3.meta.region_name
    click.echo(f"asking S3 at {s3.meta.endpoint_url} for the bucket {bucket} ...")
    try:
        s3.head_bucket(Bucket=bucket)
    except ClientError:
        where = {} if region == US_EAST_1 else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        s3.create_bucket(Bucket=bucket, **where)
    topics = [sns.create_topic(Name=f"{NAME}-{outcome}")["TopicArn"] for outcome in ("success", "error")]
    outcomes = sqs.create_queue(QueueName=f"{NAME}-outcomes")["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=outcomes, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    for topic in topics:
        sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=arn, Attributes={"RawMessageDelivery": "true"})
    queue_url = os.environ.get("VTON_QUEUE_URL") or sqs.create_queue(QueueName=f"{NAME}-results")["QueueUrl"]
    mask_queue_url = os.environ.get("VTON_MASK_QUEUE_URL") or sqs.create_queue(QueueName=f"{NAME}-masks")["QueueUrl"]
    return Cloud(bucket, queue_url, mask_queue_url, outcomes, *topics)


def _places(cloud: Cloud) -> dict[str, str]:
    """Where the container keeps its results and tells of them."""
    return {
        "VTON_BUCKET": cloud.bucket,
        "VTON_QUEUE_URL": cloud.queue_url,
        "VTON_MASK_QUEUE_URL": cloud.mask_queue_url,
    }


def _max_in_flight(mode: str, concurrency: int) -> str:
    """VTON_MAX_IN_FLIGHT: the user's own, but enough for an asynchronous endpoint.

    An invocation that times out makes way for the next one, while its picture, once begun, is finished in its place.
    """
    own = os.environ.get("VTON_MAX_IN_FLIGHT")
    if mode != ASYNC:
        return str(concurrency) if own is None else own
    enough = min(2 * concurrency, MAX_IN_FLIGHT)
    if own is None or (re.fullmatch("[0-9]{1,4}", own) and int(own) < enough):
        return str(enough)
    return own


def _container(output: Path, command: Sequence[str], environ: Mapping[str, str]) -> Container:
    """The container, not started; what the user's own environment says of a setting stands."""
    click.echo("starting the container process ...")
    own = {name: value for name, value in os.environ.items() if name.startswith("VTON_") and name in environ}
    for name in ("VTON_TRUSTED_HOSTS", "VTON_MAX_IN_FLIGHT"):  # they are part of what is given
        own.pop(name, None)
    if "VTON_OUTPUT_DIR" in os.environ:  # excludes a bucket
        environ = {name: value for name, value in environ.items() if name != "VTON_BUCKET"}
    return Container(Launch(output / "serve.log", {**environ, **own}, command))


def _asynchronous(cloud: Cloud, places: int) -> AsyncEndpoint:
    config = AsyncConfig(
        output_path=f"s3://{cloud.bucket}/async-out",
        failure_path=f"s3://{cloud.bucket}/async-fail",
        success_topic=cloud.success_topic,
        error_topic=cloud.error_topic,
        places=places,
    )
    return AsyncEndpoint(config, _client("s3"), _client("sns"))


def _folder(place: str) -> Folder:
    return S3Folder(_client("s3"), place) if place.startswith("s3://") else LocalFolder(Path(place))


def _tell(url: str, cloud: Cloud, options: Mapping[str, Any], output: Path) -> None:
    """What a caller needs, as lines that a shell takes."""
    names = ["AWS_ENDPOINT_URL", *(f"AWS_ENDPOINT_URL_{service.upper()}" for service in SERVICES), *DIRECTLY]
    if os.environ.get("AWS_ACCESS_KEY_ID") == KEYS["AWS_ACCESS_KEY_ID"]:
        names += KEYS
    exports = {name: os.environ[name] for name in names if name in os.environ}
    click.echo(
        f"\nendpoint {options['endpoint_name']} ({options['mode']}); the container's log is {output}/serve.log\n"
    )
    for name, value in {"AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": url, **exports}.items():
        click.echo(f"export {name}={shlex.quote(value)}")
    click.echo(f"\nbucket    {cloud.bucket}\nresults   {cloud.queue_url}\nmasks     {cloud.mask_queue_url}")
    if options["mode"] == ASYNC:
        click.echo(f"outcomes  {cloud.outcome_queue_url}")
        call = "invoke_endpoint_async"
        rest = f'InputLocation="s3://{cloud.bucket}/..."'
    else:
        call, rest = "invoke_endpoint", "Body=json.dumps(request)"
    click.echo(
        f'\nboto3.client("sagemaker-runtime").{call}(\n'
        f'    EndpointName="{options["endpoint_name"]}", ContentType="application/json", {rest}\n)\n'
        "serving; Ctrl-C ends it"
    )
    sys.stdout.flush()


def _handle_signals(started: list[Container]) -> None:
    """The first one ends all in order; a second one ends this process at once, and kills what it started."""
    first_s: list[float] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        if not first_s:
            first_s.append(time.monotonic())
            with suppress(OSError):  # the terminal may have gone, and what prints may have been interrupted
                os.write(sys.stderr.fileno(), b"stopping; a second signal ends it at once\n")
            raise KeyboardInterrupt
        if time.monotonic() > first_s[0] + SAME_SIGNAL_S:
            for container in started:
                container.kill()
            os._exit(EXIT_OF_SIGNAL + number)

    for number in ENDING:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` leaves it
            signal.signal(number, handle)


def _say(sentence: str) -> None:
    with suppress(OSError):  # the terminal may have gone
        click.echo(sentence, err=True)


def _end(sentence: str) -> NoReturn:
    _say(sentence)
    sys.exit(EXIT_SETTINGS)
