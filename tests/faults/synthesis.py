"""The templates of several deployments, made by one process that has no AWS account, no network and no Docker."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent.parent
NO_PROXY_ANSWERS = "http://127.0.0.1:9"
LIMIT_S = 280
ENDED_BY_A_REFUSAL = 2
OLD_BUCKET = "old-results"
OLD_QUEUES = [f"arn:aws:sqs:eu-central-1:123456789012:old-{kind}" for kind in ("results", "masks")]
IMAGE = "123456789012.dkr.ecr.eu-central-1.amazonaws.com/shop/vton@sha256:" + "0" * 64
FROM_THE_COMMAND_LINE = {"alarm_email": "operators@shop.example"}  # as `cdk -c` hands it over
CONTEXTS: dict[str, dict[str, object]] = {
    "again": {},
    "two": {
        "stacks": "vton,shop",
        "modes": "realtime,asynchronous",
        "image": IMAGE,
        "weights": "s3://shop-weights/catvton/mix/",
        "instance_type": "ml.g6.xlarge",
        "max_in_flight": "6",
        "settings": '{"VTON_STEPS": 30, "VTON_IMAGE_HOSTS": "images.shop.example"}',
    },
    "jobs": {
        "modes": ["asynchronous"],
        "image": IMAGE,
        "asynchronous_min_instances": 1,
        "settings": {"VTON_LOG_SALT": "{{resolve:secretsmanager:vton/log-salt}}"},
    },
    "network": {
        "modes": "asynchronous,realtime",
        "image": IMAGE,
        "weights": "baked",
        "vpc_id": "vpc-0123456789abcdef0",
        "subnet_ids": "subnet-0123456789abcdef0,subnet-0123456789abcdef1",
        "egress_cidrs": "10.0.0.0/8,2001:db8::/32",
        "encrypt_volume": "true",
        "min_instances": "1",
        "key_prefix": "pictures/",
    },
    "takeover": {
        "modes": "realtime,asynchronous",
        "image": IMAGE,
        "bucket": OLD_BUCKET,
        "queue_arn": OLD_QUEUES[0],
        "mask_queue_arn": OLD_QUEUES[1],
    },
}
# The first is the command itself; the others share its process, for CDK takes its time to start.
PROGRAM = """
import json, os, sys
from pathlib import Path
from deploy import app

statuses = {"default": app.main()}
for name, context in json.load(sys.stdin).items():
    app.make_app(context, f"{sys.argv[1]}/{name}").synth()
app.CDK_JSON = Path(sys.argv[1]) / "wrong.json"
app.CDK_JSON.write_text('{"context": {"min_instances": 5}}')
statuses["wrong"] = app.main()
app.CDK_JSON.write_text('{"context": [}')
statuses["garbled file"] = app.main()
for garbled in ("not json", "[]"):
    os.environ["CDK_CONTEXT_JSON"] = garbled
    statuses[garbled] = app.main()
print(json.dumps(statuses))
"""


@dataclass(frozen=True)
class Synthesis:
    """What that process left.

    Attributes:
        folder: with a folder of templates for each context, and one called "default".
        statuses: the exit status of the command with the defaults, and with each wrong context.
        told: what it wrote to stdout, line by line.
        complained: what it wrote to stderr, line by line.
    """

    folder: Path
    statuses: Mapping[str, int]
    told: list[str]
    complained: list[str]

    def text(self, context: str, stack: str = "vton") -> str:
        """The template as it is written."""
        return (self.folder / context / f"{stack}.template.json").read_text()

    def template(self, context: str, stack: str = "vton") -> dict[str, Any]:
        """The template."""
        loaded: dict[str, Any] = json.loads(self.text(context, stack))
        return loaded

    def paths(self) -> list[Path]:
        """Of all templates."""
        return sorted(self.folder.glob("*/*.template.json"))

    def findings(self) -> list[dict[str, str]]:
        """What cdk-nag found in all stacks: "Rule ID", "Resource ID", "Compliance", "Exception Reason"."""
        rows = []
        for report in sorted(self.folder.glob("*/*NagReport.csv")):
            with report.open(newline="") as lines:
                rows += list(csv.DictReader(lines))
        return rows


def synthesize(folder: Path) -> Synthesis:
    """Runs that process, in a folder that is empty."""
    commands = folder / "commands"
    commands.mkdir()
    node = shutil.which("node")
    if node is None:
        raise RuntimeError("the CDK needs node")
    (commands / "node").symlink_to(Path(node).resolve())
    environ = {
        "PATH": str(commands),  # no docker, no aws
        "HOME": str(Path.home()),  # where jsii keeps what it unpacked
        "CDK_OUTDIR": str(folder / "default"),
        "CDK_CONTEXT_JSON": json.dumps(FROM_THE_COMMAND_LINE),
        "AWS_EC2_METADATA_DISABLED": "true",
        "http_proxy": NO_PROXY_ANSWERS,
        "https_proxy": NO_PROXY_ANSWERS,
        "JSII_SILENCE_WARNING_END_OF_LIFE_NODE_VERSION": "20",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, str(folder)],
        input=json.dumps(CONTEXTS),
        env=environ,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    if done.returncode != 0:
        raise AssertionError(f"synthesis ended with {done.returncode}: {done.stderr[-4000:]}")
    *told, statuses = done.stdout.splitlines()
    return Synthesis(folder, json.loads(statuses), told, done.stderr.splitlines())


@lru_cache(maxsize=1)
def synthesis_in(folder: Path) -> Synthesis:
    """The same, once per folder."""
    folder.mkdir(exist_ok=True)
    return synthesize(folder)


def of_type(template: Mapping[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """Logical id to properties of the resources of one type ("S3::Bucket")."""
    return {
        name: resource.get("Properties", {})
        for name, resource in template["Resources"].items()
        if resource["Type"] == f"AWS::{kind}"
    }


def role_statements(template: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The statements of all policies of roles, each with lists of actions and resources."""
    statements = []
    for policy in of_type(template, "IAM::Policy").values():
        for statement in policy["PolicyDocument"]["Statement"]:
            lists = {name: _listed(statement[name]) for name in ("Action", "Resource")}
            statements.append({**statement, **lists})
    return statements


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
