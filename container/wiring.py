"""The composition root: the only place that constructs."""

from __future__ import annotations

import os
import time
import warnings
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Callable

import boto3
import numpy as np
import structlog
from boto3.exceptions import PythonDeprecationWarning
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from container.decoder import Decoder, ProcessDecoder
from container.fetch import ByScheme, Fetcher, HostPolicy, HttpsFetcher, S3Fetcher
from container.get_masks import MaskService
from container.get_vton import Defaults, TryOnService
from container.notify import Notifier, NullNotifier, SqsNotifier
from container.person_masks import PersonMasker
from container.settings import Settings, SettingsError
from container.sharing import Admission
from container.storage import LocalStorage, S3Storage, Storage, wait_until_reachable
from container.telemetry import Metrics, Pseudonyms
from container.worker import Models, Worker
from model import ENGINES, choose_masker, device_of, load_engine, load_masker, without
from model.interface import (
    BALANCED,
    EXACT,
    Engine,
    EngineOptions,
    GenerationSettings,
    MaskerOptions,
    OutOfMemory,
    PersonNotFound,
    TryOnInputs,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

FETCHES_PER_REQUEST = 4  # person, mask, top, bottom
REACHABLE_S = 300.0  # a process that finds no bucket says so and waits, then ends
FEWEST_DECODERS = 2  # so that one file that takes its time does not stop all others
WARM_UP_STEPS = 2  # every kernel of a picture runs in two steps
GUIDED, UNGUIDED = 2.0, 1.0
CPU_WARM_UP_PX = 64  # a side; a CPU chooses nothing by size, and a full picture would take it minutes
UNUSED = ("transformers", "accelerate")  # diffusers would import them, for a second and a half
AWS = Config(
    connect_timeout=3,
    read_timeout=10,
    retries={"total_max_attempts": 3, "mode": "standard"},
    user_agent_extra="vton-endpoint",
)
UPLOADS = AWS.merge(
    Config(
        connect_timeout=60,  # each wait to send on, too
        read_timeout=300,  # from the last byte sent: some MB of a part still lie in buffers then, before a slow line
        retries={"total_max_attempts": 10, "mode": "standard"},
    )
)

log = structlog.get_logger()


@dataclass(frozen=True)
class App:
    """One process's parts, wired."""

    settings: Settings
    service: TryOnService
    masks: MaskService
    masker: PersonMasker
    decoder: Decoder
    worker: Worker
    admission: Admission
    metrics: Metrics
    request_pool: Executor
    pseudonyms: Pseudonyms

    def start(self) -> None:
        """Begins to load the models, and starts the decoders beside that; `worker` tells the end of it."""
        self.decoder.start()
        self.worker.start()

    def stop(self, timeout_s: float) -> None:
        """Ends the worker, then the decoders, each within `timeout_s`."""
        self.worker.stop(timeout_s)
        self.decoder.stop(timeout_s)


@dataclass(frozen=True)
class Ports:
    """What the service reaches the world through."""

    fetcher: Fetcher
    decoder: Decoder
    storage: Storage
    notifier: Notifier
    mask_notifier: Notifier


def build(settings: Settings, *, fetcher: Fetcher | None = None, progress: bool = False) -> App:
    """The service that these settings describe; its model is not loaded until `app.start()`.

    Args:
        settings: of this process.
        fetcher: for references that are no URLs (the command line's paths); by default URLs only.
        progress: show the denoising steps on stderr.
    Raises:
        SettingsError: the engine is unknown, or AWS cannot be addressed with the environment's settings.
    """
    if settings.engine not in ENGINES:
        raise SettingsError(f"VTON_ENGINE must be one of: {', '.join(sorted(ENGINES))}")
    results, masks = settings.queue_url, settings.mask_queue_url or settings.queue_url
    ports = Ports(
        fetcher=fetcher or _fetcher(settings),
        decoder=ProcessDecoder(_decoders()),
        storage=_storage(settings),
        notifier=_notifier(results, settings.max_in_flight),
        mask_notifier=_notifier(masks, settings.max_in_flight),
    )
    warm_up = partial(_warm_up, settings)
    return assemble(settings, ports, _loader(settings, ports.storage, progress), warm_up)


def assemble(settings: Settings, ports: Ports, load: Callable[[], Models], warm_up: Callable[[Models], None]) -> App:
    """The service around these ports and these models."""
    metrics = Metrics()
    worker = Worker(load, warm_up, capacity=settings.max_in_flight, max_batch=settings.max_batch)
    admission = Admission(settings.max_in_flight, worker.retry_after_s)
    metrics.in_flight.set_function(lambda: admission.taken)
    metrics.ready.set_function(lambda: worker.ready and not admission.draining)
    masker = PersonMasker(worker, metrics)
    service = TryOnService(
        fetcher=ports.fetcher,
        decoder=ports.decoder,
        worker=worker,
        masker=masker,
        storage=ports.storage,
        notifier=ports.notifier,
        defaults=Defaults(
            steps=settings.steps,
            guidance=settings.guidance,
            join=settings.garment_join,
            key_prefix=settings.key_prefix,
            width=settings.width,
            height=settings.height,
            quality=settings.quality,
        ),
        fetch_pool=ThreadPoolExecutor(FETCHES_PER_REQUEST * settings.max_in_flight, "fetch"),
        metrics=metrics,
    )
    masks = MaskService(
        fetcher=ports.fetcher,
        decoder=ports.decoder,
        masker=masker,
        storage=ports.storage,
        notifier=ports.mask_notifier,
        key_prefix=settings.key_prefix,
        metrics=metrics,
    )
    pool = ThreadPoolExecutor(settings.max_in_flight, "request")
    salt = settings.log_salt.get_secret_value() if settings.log_salt is not None else None
    return App(settings, service, masks, masker, ports.decoder, worker, admission, metrics, pool, Pseudonyms(salt))


def https_fetcher(settings: Settings) -> Fetcher:
    """Fetches http(s) URLs only."""
    policy = HostPolicy(settings.image_hosts, settings.trusted_hosts)
    pool = ThreadPoolExecutor(FETCHES_PER_REQUEST * settings.max_in_flight, "resolve")
    return HttpsFetcher(policy, pool)


def s3_client(connections: int) -> S3Client:
    """A client of S3 for large files, with that many connections; keys, region and place are boto3's settings.

    Raises:
        SettingsError: S3 cannot be addressed with them.
    """
    try:
        return _session().client("s3", config=UPLOADS.merge(Config(max_pool_connections=connections)))
    except BotoCoreError as exc:
        raise SettingsError(f"S3 cannot be addressed: {exc}") from exc


def _fetcher(settings: Settings) -> Fetcher:
    s3 = S3Fetcher(_s3(settings), settings.bucket, settings.key_prefix) if settings.bucket else None
    return ByScheme(https_fetcher(settings), s3)


def _decoders() -> int:
    """Enough for one request's pictures side by side, as far as there are cores; four take 5 GiB at the very most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(FEWEST_DECODERS, min(FETCHES_PER_REQUEST, cores))


def _storage(settings: Settings) -> Storage:
    if settings.bucket:
        return S3Storage(_s3(settings), settings.bucket)
    return LocalStorage(settings.output_dir or Path())


def _notifier(queue_url: str | None, connections: int) -> Notifier:
    if queue_url is None:
        return NullNotifier()
    try:
        config = AWS.merge(Config(max_pool_connections=connections))
        return SqsNotifier(_session().client("sqs", config=config), queue_url)
    except BotoCoreError as exc:
        raise SettingsError(f"SQS cannot be addressed: {exc}") from exc


def _s3(settings: Settings) -> S3Client:
    connections = FETCHES_PER_REQUEST * settings.max_in_flight  # one for each thread that fetches
    try:
        return _session().client("s3", config=AWS.merge(Config(max_pool_connections=connections)))
    except BotoCoreError as exc:
        raise SettingsError(f"S3 cannot be addressed: {exc}") from exc


def _session() -> boto3.session.Session:
    warnings.filterwarnings("ignore", category=PythonDeprecationWarning)  # Python 3.9 is what the container runs
    return boto3.session.Session()


def _loader(settings: Settings, storage: Storage, progress: bool) -> Callable[[], Models]:
    options = EngineOptions(
        weights=settings.weights,
        variant=settings.variant,
        device=settings.device,
        dtype=settings.dtype,
        tf32=settings.tf32,
        compilation=settings.compile,
        progress=progress,
        memory=settings.memory,
    )
    unused = [name for name in UNUSED if settings.memory == "normal" or name != "accelerate"]  # which offloads

    def load() -> Models:
        # Before torch is imported. Threads that spin for each other starve where cores are shared: on two busy ones a
        # picture took 40 times as long.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # diffusers asks for CUDA's autocast when it is imported, whether there is CUDA or not.
        warnings.filterwarnings("ignore", "User provided device_type of 'cuda'", UserWarning)
        began = time.monotonic()
        with without(unused):
            engine = load_engine(settings.engine, options)
        name = choose_masker(settings.weights) if settings.masker == "auto" else settings.masker
        masker = None
        if name is not None and name != "off":
            masker = load_masker(name, MaskerOptions(settings.weights, settings.device, settings.dtype))
        log.info("models_loaded", engine=engine.name, masker=name or "off", elapsed_ms=_ms_since(began))
        wait_until_reachable(storage, settings.key_prefix, REACHABLE_S)
        return Models(engine, masker)

    return load


def _warm_up(settings: Settings, models: Models) -> None:
    """A throw-away picture, on CUDA at the size of the real ones; a masker finds nobody on it.

    Where forwards are compiled, all of them are here, on any device at that size: in a request they would take minutes.

    Raises:
        EngineError: a picture could not be made by itself, or a mask.
    """
    began = time.monotonic()
    width, height, steps = settings.width, settings.height, WARM_UP_STEPS
    if device_of(settings.device) == "cpu" and settings.compile == "off":
        width, height, steps = CPU_WARM_UP_PX, CPU_WARM_UP_PX, 1
    grey = np.full((height, width, 3), 128, np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2] = 255
    inputs = TryOnInputs(grey, grey, mask)
    wanted = GenerationSettings(steps, settings.guidance, 0, width, height, settings.quality)
    models.engine.generate(inputs, wanted)
    if settings.compile != "off":
        _warm_up_batches(models.engine, inputs, wanted, settings.max_batch)
    if models.masker is not None:
        with suppress(PersonNotFound):
            models.masker.mask(grey, "overall")
    log.info("warmed_up", width=width, height=height, steps=steps, elapsed_ms=_ms_since(began))


def _warm_up_batches(engine: Engine, inputs: TryOnInputs, wanted: GenerationSettings, max_batch: int) -> None:
    """Pictures of every kind, in batches up to the first that finds too little memory: the worker halves such a one."""
    for count, guidance, quality in product(range(1, max_batch + 1), (GUIDED, UNGUIDED), (EXACT, BALANCED)):
        others = replace(wanted, guidance=guidance, quality=quality)
        try:
            engine.generate_batch([inputs] * count, [others] * count)
        except OutOfMemory as exc:
            if count == 1:
                raise
            log.warning("batch_too_large", pictures=count, max_batch=max_batch, reason=str(exc))
            return


def _ms_since(began: float) -> float:
    return round(1000 * (time.monotonic() - began), 1)
