"""deploy: what the templates of the deployment promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..registry import row
from ..stage import Stage
from ..synthesis import REPOSITORY, Synthesis, of_type, role_statements, synthesis_in

LANE = "waiting"
WITHOUT_RESOURCE = {"ecr:GetAuthorizationToken", "cloudwatch:PutMetricData"}
PREFIXES = ("/users/*", "/asynchronous/inputs/*", "/asynchronous/outputs/*", "/asynchronous/failures/*")
FEWEST_REASON_CHARACTERS = 30


@row("D01", LANE)
def offline(stage: Stage) -> str:
    """The real app writes its templates with no account, network or Docker, twice the same."""
    made = _made(stage)
    assert made.statuses["default"] == 0
    assert made.text("default") == made.text("again"), "two syntheses differ"
    assert str(REPOSITORY) not in made.text("default"), "the template names this machine's paths"
    return f"{len(made.paths())} templates, {len(made.template('default')['Resources'])} resources by default"


@row("D02", LANE)
def permissions(stage: Stage) -> str:
    """Every statement of the role names its actions and what they reach."""
    made, count = _made(stage), 0
    for template in _templates(made, "default", "two"):
        assert "ManagedPolicyArns" not in json.dumps(template), "a managed policy"
        for statement in role_statements(template):
            count += 1
            assert not any("*" in action for action in statement["Action"]), statement["Action"]
            if "*" in statement["Resource"]:
                assert set(statement["Action"]) <= WITHOUT_RESOURCE, statement["Action"]
            if any(action.startswith("s3:") and "Object" in action for action in statement["Action"]):
                for resource in statement["Resource"]:
                    ending = resource["Fn::Join"][1][-1]
                    assert ending in PREFIXES or ending == ":s3:::shop-weights/catvton/mix/*", ending
    return f"{count} statements"


@row("D03", LANE)
def promises(stage: Stage) -> str:
    """Bucket, queues and endpoint are as safe as they are said to be."""
    made = _made(stage)
    for template in _templates(made, "default", "two"):
        _bucket_is_safe(template)
        queues = of_type(template, "SQS::Queue").values()
        assert all("KmsMasterKeyId" in queue for queue in queues)
        assert sum("RedrivePolicy" in queue for queue in queues) == len(queues) / 2
        metrics = [alarm.get("MetricName") for alarm in of_type(template, "CloudWatch::Alarm").values()]
        assert metrics.count("ApproximateNumberOfMessagesVisible") == len(queues) / 2
        endpoint = _realtime(template, "SageMaker::Endpoint")
        assert endpoint["DeploymentConfig"]["AutoRollbackConfiguration"]["Alarms"]
        (variant,) = _realtime(template, "SageMaker::EndpointConfig")["ProductionVariants"]
        assert variant["InitialInstanceCount"] >= 2
        assert _realtime(template, "ApplicationAutoScaling::ScalableTarget")["MinCapacity"] >= 2
    configurations = of_type(made.template("network"), "SageMaker::EndpointConfig").values()
    assert all("KmsKeyId" in configuration for configuration in configurations)
    return "volume KMS where asked for: instances with NVMe may refuse it"


@row("D04", LANE)
def nag(stage: Stage) -> str:
    """cdk-nag's AwsSolutions find nothing; what is excepted has its reason."""
    findings = _made(stage).findings()
    wrong = [one for one in findings if one["Compliance"] not in ("Compliant", "Suppressed")]
    assert not wrong, wrong[:3]
    excepted = [one for one in findings if one["Compliance"] == "Suppressed"]
    assert all(len(one["Exception Reason"]) >= FEWEST_REASON_CHARACTERS for one in excepted)
    assert findings, "no rule was applied"
    return f"{len(findings)} findings, {len(excepted)} excepted with a reason"


@row("D05", LANE)
def two_stacks(stage: Stage) -> str:
    """Two stacks of one account share no name, and no update takes the bucket away."""
    made = _made(stage)
    vton, shop = (_names(made.template("two", stack)) for stack in ("vton", "shop"))
    assert not vton & shop, vton & shop
    for template in _templates(made, "default", "two"):
        for resource in template["Resources"].values():
            if resource["Type"] == "AWS::S3::Bucket":
                assert "BucketName" not in resource["Properties"]
                assert resource["DeletionPolicy"] == resource["UpdateReplacePolicy"] == "Retain"
    # Another instance type, image and number of places: the bucket is the same resource, unchanged; with other
    # modes too.
    assert of_type(made.template("jobs"), "S3::Bucket") == of_type(made.template("two"), "S3::Bucket")
    assert of_type(made.template("default"), "S3::Bucket") == of_type(made.template("two"), "S3::Bucket")
    return f"{len(vton)} names, each of its stack"


def _made(stage: Stage) -> Synthesis:
    return synthesis_in(Path(stage.ground.folder) / "synthesis")


def _templates(made: Synthesis, *contexts: str) -> list[dict[str, Any]]:
    return [made.template(context) for context in contexts]


def _realtime(template: dict[str, Any], kind: str) -> dict[str, Any]:
    (found,) = (one for name, one in of_type(template, kind).items() if name.startswith("realtime"))
    return found


def _bucket_is_safe(template: dict[str, Any]) -> None:
    for bucket in of_type(template, "S3::Bucket").values():
        assert list(bucket["PublicAccessBlockConfiguration"].values()) == [True] * 4
        assert bucket["VersioningConfiguration"] == {"Status": "Enabled"}
        assert bucket["LifecycleConfiguration"]["Rules"]
    (pictures,) = (one for name, one in of_type(template, "S3::Bucket").items() if name.startswith("Bucket"))
    (rule,) = pictures["BucketEncryption"]["ServerSideEncryptionConfiguration"]
    assert rule["ServerSideEncryptionByDefault"]["SSEAlgorithm"] == "aws:kms"
    policies = of_type(template, "S3::BucketPolicy").values()
    assert len(policies) == len(of_type(template, "S3::Bucket"))
    for policy in policies:
        assert "aws:SecureTransport" in json.dumps(policy)


def _names(template: dict[str, Any]) -> set[str]:
    """What the resources of a stack are called by the template itself."""
    named = ("EndpointName", "LogGroupName", "PolicyName")
    return {
        value
        for resource in template["Resources"].values()
        for name, value in resource.get("Properties", {}).items()
        if name in named and isinstance(value, str) and resource["Type"] != "AWS::IAM::Policy"
    }
