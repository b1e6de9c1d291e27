from __future__ import annotations

import os

# Threads that spin for each other starve where several processes share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families
from stand_in import usual_files

from deploy.demo import (
    LocalCloud,
    client,
    container_environment,
    http_server,
    image_host,
    local_cloud,
    serving,
)
from deploy.local_runtime import create_runtime


@dataclass(frozen=True)
class Endpoint:
    """The real container process with the embedded model, in front of it the runtime, behind it S3 and SQS."""

    cloud: LocalCloud
    container: str
    runtime: str
    images: str
    log: Path

    def caller(self) -> Any:
        return client("sagemaker-runtime", self.runtime)

    def metric(self, name: str) -> float:
        families = text_string_to_metric_families(requests.get(f"{self.container}/metrics", timeout=30).text)
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory):
    log = tmp_path_factory.mktemp("endpoint") / "serve.log"
    with ExitStack() as stack:
        cloud = stack.enter_context(local_cloud())
        images = stack.enter_context(image_host(usual_files()))
        environment = container_environment(cloud, f"{images},{cloud.url.rpartition('/')[2]}")
        container = stack.enter_context(serving({**environment, "VTON_STEPS": "2"}, log))
        runtime = stack.enter_context(http_server(create_runtime(container)))
        yield Endpoint(cloud, container, runtime, images, log)
