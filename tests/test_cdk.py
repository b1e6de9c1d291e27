"""The templates keep the promises of the deployment. The real app makes them once, offline: see faults/synthesis.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from faults import synthesis
from faults.synthesis import (
    CONTEXTS,
    ENDED_BY_A_REFUSAL,
    IMAGE,
    OLD_BUCKET,
    OLD_QUEUES,
    REPOSITORY,
    of_type,
    role_statements,
    synthesize,
)

from container.settings import PREFIX, Settings
from container.telemetry import METRIC_UNITS, OUTCOME, OUTCOMES
from container.weights_push import Destination, DestinationInvalid
from deploy.cdk_context import WEIGHTS_URI, Plan, PlanError
from deploy.cdk_settings import UNFIT, VARIANTS
from model import ENGINES

pytestmark = pytest.mark.slow

REFUSED = [
    ({"min_instances": "0"}, "min_instances: must be at least 1"),
    ({"min_instances": -1}, "min_instances: .* greater than or equal to 0"),
    ({"min_instances": "two"}, "min_instances: .* valid integer"),
    ({"min_instances": 1.5}, "min_instances: .* valid integer"),
    ({"min_instances": True}, "min_instances: must be a number"),
    ({"min_instances": 3, "max_instances": 2}, "min_instances is above max_instances"),
    (
        {"asynchronous_min_instances": 3, "asynchronous_max_instances": 2},
        "asynchronous_min_instances is above asynchronous_max_instances",
    ),
    ({"asynchronous_max_instances": 0}, "asynchronous_max_instances: .* greater than or equal to 1"),
    ({"concurrent_requests_target": "0"}, "concurrent_requests_target: .* greater than 0"),
    ({"backlog_target": "nan"}, "backlog_target: "),
    ({"max_in_flight": 0}, "max_in_flight: "),
    ({"max_in_flight": 501}, "max_in_flight: .* 500"),
    ({"health_check_timeout_s": 59}, "health_check_timeout_s: .* 60"),
    ({"download_timeout_s": 3601}, "download_timeout_s: .* 3600"),
    ({"asynchronous_deadline_s": 3601}, "asynchronous_deadline_s: "),
    ({"asynchronous_days": 0}, "asynchronous_days: "),
    ({"modes": ""}, "modes: must name at least one"),
    ({"modes": "batch"}, "modes: .*'realtime' or 'asynchronous'"),
    ({"modes": "realtime,realtime"}, "modes: .* none twice"),
    ({"modes": 7}, "modes: "),
    ({"stacks": "9lives"}, "stacks: "),
    ({"stacks": "a" * 50}, "stacks: "),
    ({"stacks": "shop,shop"}, "stacks: .* none twice"),
    ({"stacks": "shop,Shop"}, "stacks: .* none twice, in whatever case"),
    ({"image": "vton:latest"}, "image: must be a repository of ECR"),
    ({"image": "123456789012.dkr.ecr.eu-central-1.amazonaws.com/vton"}, "image: .* :tag or @sha256:digest"),
    ({"image": "docker.io/shop/vton:1"}, "image: must be a repository of ECR"),
    ({"weights": "s3://shop-weights/catvton"}, 'weights: must end in "/"'),
    ({"weights": "s3://shop-weights/catvton/mix.safetensors"}, 'weights: must end in "/"'),
    ({"weights": "s3://Shop_Weights/catvton/"}, "weights: must be "),
    ({"weights": "weights/"}, "weights: must be "),
    ({"weights": "s3://shop-weights/"}, "weights: must be "),
    ({"weights": "s3://shop-weights/./catvton/"}, "weights: must be "),
    ({"weights": "s3://shop-weights/catvton/../mix/"}, "weights: must be "),
    ({"weights": ""}, "weights: must be "),
    ({"weights": "baked"}, "^weights baked needs image, one that carries them"),
    ({"instance_type": "g5.xlarge"}, "instance_type: must look like ml.g5.xlarge"),
    ({"instance_type": "ml.g7e.2xlarge"}, "instance_type: is a Blackwell GPU"),
    ({"instance_type": "ml.p6-b200.48xlarge"}, "instance_type: is a Blackwell GPU"),
    ({"instance_type": "ml.m5.large"}, "instance_type: must have exactly one GPU"),
    ({"instance_type": "ml.g5g.xlarge"}, "instance_type: must have exactly one GPU"),
    ({"instance_type": "ml.g5.12xlarge"}, "instance_type: must have exactly one GPU"),
    ({"instance_type": "ml.g6e.48xlarge"}, "instance_type: must have exactly one GPU"),
    ({"instance_type": "ml.p5.48xlarge"}, "instance_type: must have exactly one GPU"),
    ({"inference_ami": "latest"}, "inference_ami: "),
    ({"vpc_id": "vpc-0123456789abcdef0"}, "vpc_id and subnet_ids belong together"),
    ({"subnet_ids": "subnet-0123456789abcdef0"}, "vpc_id and subnet_ids belong together"),
    (
        {"vpc_id": "vpc-0123456789abcdef0", "subnet_ids": ["subnet-0123456789abcdef0"]},
        "subnet_ids needs at least two",
    ),
    ({"vpc_id": "default", "subnet_ids": "subnet-0123456789abcdef0"}, "vpc_id: "),
    ({"subnet_ids": ["subnet-0123456789abcdef0"] * 2}, "subnet_ids: must name none twice"),
    ({"egress_cidrs": "10.0.0.0/8"}, "egress_cidrs needs vpc_id"),
    ({"egress_cidrs": ""}, "egress_cidrs: must name at least one"),
    ({"egress_cidrs": "10.0.0.0/8,10.0.0.0/8"}, "egress_cidrs: must name none twice"),
    ({"egress_cidrs": "10.0.0.1/8"}, "egress_cidrs: 10.0.0.1/8 has host bits set"),
    ({"egress_cidrs": ["10.0.0.0"]}, "egress_cidrs: must have 10.0.0.0/32 instead of 10.0.0.0, "),
    ({"egress_cidrs": "10.0.0.0/255.0.0.0"}, "egress_cidrs: must have 10.0.0.0/8 instead of "),
    ({"egress_cidrs": "shop.example/8"}, "egress_cidrs: 'shop.example/8' does not appear to be"),
    ({"network_isolation": "true"}, "network_isolation: cannot be had: the service fetches URLs"),
    ({"encrypt_volume": "perhaps"}, "encrypt_volume: "),
    ({"key_prefix": "pictures"}, "key_prefix: "),
    ({"key_prefix": "asynchronous/"}, "key_prefix: must not begin with asynchronous/: what lies there expires"),
    ({"key_prefix": "asynchronous/inputs/"}, "key_prefix: must not begin with asynchronous/"),
    ({"bucket": "Old_Results"}, "bucket: "),
    ({"bucket": "s3://old-results"}, "bucket: "),
    ({"queue_arn": "https://sqs.eu-central-1.amazonaws.com/123456789012/old"}, "queue_arn: "),
    ({"queue_arn": "arn:aws:sqs:eu-central-1:123456789012:old.fifo"}, "queue_arn: "),
    ({"mask_queue_arn": "old-masks"}, "mask_queue_arn: "),
    ({"alarm_email": "nobody"}, "alarm_email: "),
    ({"settings": "VTON_STEPS=30"}, "settings: must be a JSON object"),
    ({"settings": "[1]"}, "settings: must be a JSON object"),
    ({"settings": '{"VTON_STEPS": 30, "VTON_STEPS": 40}'}, "settings: must be a JSON object"),
    ({"settings": {"VTON_IMAGE_HOSTS": ["shop.example"]}}, "settings: must have texts, numbers or truth values"),
    ({"settings": {"VTON_STEPS": None}}, "settings: must have texts, numbers or truth values"),
    ({"settings": {"STEPS": 30}}, "settings: STEPS is no VTON_ variable"),
    ({"settings": {"VTON_STEPS": 101}}, "settings: the container would refuse VTON_STEPS"),
    ({"settings": {"VTON_STEP": 30}}, "settings: the container would refuse unknown setting VTON_STEP"),
    ({"settings": {"VTON_BUCKET": "another"}}, "settings: VTON_BUCKET is set by the stack"),
    ({"settings": {"VTON_PORT": "9000"}}, "settings: VTON_PORT is set by the stack"),
    ({"settings": {"VTON_LOG_LEVEL": "ERROR"}}, "settings: the container would refuse VTON_METRICS_NAMESPACE needs"),
    ({"settings": {"VTON_LOG_SALT": "sixteen characters"}}, "settings: VTON_LOG_SALT is a secret"),
    ({"settings": {"VTON_LOG_SALT": "{{resolve:ssm-secure:/vton/log-salt}}"}}, "settings: VTON_LOG_SALT is a secret"),
    *[({"settings": {name: "1"}}, f"settings: {name} cannot be had: ") for name in sorted(UNFIT)],
    ({"settings": {"VTON_ENGINE": "fastfit"}}, "settings: VTON_ENGINE must be one of catvton$"),
    ({"settings": {"VTON_VARIANT": "safety"}}, "settings: VTON_VARIANT must be one of mix, vitonhd, dresscode$"),
    ({"settings": {"VTON_IMAGE_HOSTS": ",".join(["shop.example"] * 99)}}, "settings: VTON_IMAGE_HOSTS is longer"),
    ({"min_instance": 2}, "unknown context value min_instance; did you mean min_instances?"),
    ({"zzz": 2}, "unknown context value zzz$"),
    ({"min-instances": 5}, "unknown context value min-instances; did you mean min_instances?"),
    ({"minInstances": 5}, "unknown context value minInstances; did you mean min_instances?"),
    ({"Settings": {}}, "unknown context value Settings; did you mean settings?"),
    ({"weights-uri": "x"}, "unknown context value weights-uri; did you mean weights?"),
]
WITHOUT_RESOURCE = {  # IAM knows none for them
    "ecr:GetAuthorizationToken",
    "cloudwatch:PutMetricData",
    "ec2:DescribeDhcpOptions",
    "ec2:DescribeNetworkInterfaces",
    "ec2:DescribeSecurityGroups",
    "ec2:DescribeSubnets",
    "ec2:DescribeVpcs",
}
LARGEST = {
    **CONTEXTS["two"],
    "stacks": "vton",
    "weights": f"s3://shop-weights/{'a' * 900}/",  # a key has at most 1024 bytes
    "key_prefix": f"{'p' * 50}/",
    "vpc_id": "vpc-0123456789abcdef0",
    "subnet_ids": [f"subnet-0123456789abcde{number:02x}" for number in range(16)],  # no model takes more
    "encrypt_volume": True,
}
PHYSICAL_NAMES = re.compile(r"(Bucket|Queue|Topic|Role|Policy|Model|EndpointConfig|Alarm|Dashboard|Key)?Name")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(synthesis.CONTEXTS, "largest", LARGEST)
        return synthesize(tmp_path_factory.mktemp("synthesis"))


@pytest.fixture(scope="module")
def both(made):
    """Both modes, weights in S3, an image that is there already."""
    return made.template("two")


def only(resources):
    (one,) = resources.values()
    return one


def in_mode(template, kind, mode):
    """The one resource of that type in the endpoint of that mode."""
    return only({name: found for name, found in of_type(template, kind).items() if name.startswith(mode)})


def every(made):
    return [json.loads(path.read_text()) for path in made.paths()]


def variables_of(template, mode):
    return in_mode(template, "SageMaker::Model", mode)["PrimaryContainer"]["Environment"]


def ending(value):
    """The text with which a resource's name ends: what follows the last reference."""
    return value["Fn::Join"][1][-1] if isinstance(value, dict) and "Fn::Join" in value else value


# --- synthesis


def test_it_is_made_without_an_account_a_network_or_docker(made):
    assert made.statuses["default"] == 0
    assert made.told == [str(made.folder / "default" / "vton.template.json")]
    assert Path(made.told[0]).exists()


def test_a_wrong_value_is_one_sentence_and_an_exit_status(made):
    assert made.statuses["wrong"] == ENDED_BY_A_REFUSAL
    assert made.complained[0] == "deployment refused: min_instances is above max_instances"


def test_a_context_that_cannot_be_read_is_one_sentence_and_an_exit_status(made):
    garbled = ("garbled file", "not json", "[]")
    assert [made.statuses[name] for name in garbled] == [ENDED_BY_A_REFUSAL] * 3
    assert made.complained[1:] == [
        "deployment refused: wrong.json is not JSON, or has a name twice",
        "deployment refused: CDK_CONTEXT_JSON is not JSON, or has a name twice",
        "deployment refused: CDK_CONTEXT_JSON must be a JSON object",
    ]


def test_the_same_context_makes_the_same_template(made):
    assert made.text("default") == made.text("again")


def test_nothing_in_a_template_belongs_to_one_account_region_or_machine(made):
    for path in made.paths():
        text = path.read_text()
        assert str(REPOSITORY) not in text
        assert not re.search(r"[^0-9a-f][0-9]{12}[^0-9a-f]", text.replace(IMAGE, "").replace("123456789012", ""))


def test_what_the_command_line_says_arrives(made):
    subscription = only(of_type(made.template("default"), "SNS::Subscription"))
    assert (subscription["Protocol"], subscription["Endpoint"]) == ("email", "operators@shop.example")


@pytest.mark.parametrize(("context", "sentence"), REFUSED)
def test_a_wrong_context_value_is_refused_with_a_sentence_that_names_it(context, sentence):
    with pytest.raises(PlanError, match=sentence):
        Plan.from_context(context)


def test_every_context_value_is_tried_with_a_wrong_one():
    assert set(Plan.model_fields) - {name for context, _ in REFUSED for name in context} == set()


def test_an_image_is_built_where_there_is_a_dockerfile_only(monkeypatch, tmp_path):
    monkeypatch.setattr("deploy.cdk_context.DOCKERFILE", tmp_path / "Dockerfile")
    with pytest.raises(PlanError, match="image must be named where the package is installed"):
        Plan.from_context({})
    assert Plan.from_context({"image": IMAGE}).image == IMAGE


def test_the_defaults_and_the_context_of_cdk_itself_are_taken():
    own = {
        "@aws-cdk/core:x": True,
        "aws:cdk:enable-analytics": 1,
        "availability-zones:account=1": [],
        "aws-cdk:enableDiffNoFail": True,
        "cli-telemetry": False,
        "acknowledged-issue-numbers": [34892],
    }
    assert Plan.from_context(own) == Plan()


@pytest.mark.parametrize("instance_type", [f"ml.{one}xlarge" for one in ("g4dn.", "g5.2", "g6.4", "g6e.16", "p5.4")])
def test_known_instances_are_taken(instance_type):
    assert Plan.from_context({"instance_type": instance_type}).instance_type == instance_type


def test_engines_and_variants_are_those_of_the_container():
    from model.catvton.published import ATTENTION_FOLDERS  # its package loads torch

    assert VARIANTS.keys() == ENGINES.keys()
    assert VARIANTS["catvton"] == tuple(ATTENTION_FOLDERS)


@pytest.mark.parametrize("prefix", ["", "a", "a/", "a/b-1/", "a*/", "./a/", "a/../", "a//b/", "(a)!'_.x/", "é/"])
def test_weights_are_taken_from_where_they_can_be_pushed_to(prefix):
    uri = f"s3://shop-weights/{prefix}"
    try:
        Destination.parse(uri)
    except DestinationInvalid:
        assert not WEIGHTS_URI.fullmatch(uri)
    else:
        assert WEIGHTS_URI.fullmatch(uri)


def test_a_secret_may_be_referred_to():
    salt = "{{resolve:secretsmanager:vton/log-salt}}"
    assert Plan.from_context({"settings": {"VTON_LOG_SALT": salt}}).settings["VTON_LOG_SALT"] == salt


def test_the_readme_names_every_context_value():
    table = (REPOSITORY / "deploy" / "README.md").read_text().partition("## Metrics")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(Plan.model_fields)


def test_cdk_json_runs_the_app():
    written = json.loads((REPOSITORY / "deploy" / "cdk.json").read_text())
    assert written["app"].endswith("python -m deploy.app")
    assert Plan.from_context(written["context"]) == Plan()


def test_make_synth_is_there():
    done = subprocess.run(["make", "--dry-run", "synth"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0
    assert "deploy.app" in done.stdout


def test_the_container_gets_no_cdk():
    names = {line.partition("==")[0] for line in (REPOSITORY / "requirements" / "image.txt").read_text().splitlines()}
    assert not {"aws-cdk-lib", "cdk-nag", "constructs", "jsii", "pytest", "moto"} & names
    assert {"fastapi", "boto3"} <= names


# --- what is kept


def test_both_buckets_are_private_versioned_encrypted_and_kept(made):
    for template in every(made):
        for name, bucket in of_type(template, "S3::Bucket").items():
            assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
            assert len(bucket["PublicAccessBlockConfiguration"]) == 4
            assert bucket["VersioningConfiguration"] == {"Status": "Enabled"}
            assert "BucketName" not in bucket
            resource = template["Resources"][name]
            assert (resource["DeletionPolicy"], resource["UpdateReplacePolicy"]) == ("Retain", "Retain")
            (rule,) = bucket["BucketEncryption"]["ServerSideEncryptionConfiguration"]
            algorithm = rule["ServerSideEncryptionByDefault"]["SSEAlgorithm"]
            assert algorithm == ("AES256" if name.startswith("AccessLogs") else "aws:kms")


def test_pictures_are_encrypted_with_a_key_that_rotates_and_is_kept(both):
    (name,) = of_type(both, "KMS::Key")
    assert both["Resources"][name]["Properties"]["EnableKeyRotation"] is True
    assert both["Resources"][name]["DeletionPolicy"] == "Retain"
    bucket = in_mode(both, "S3::Bucket", "Bucket")
    (rule,) = bucket["BucketEncryption"]["ServerSideEncryptionConfiguration"]
    assert rule["ServerSideEncryptionByDefault"]["KMSMasterKeyID"] == {"Fn::GetAtt": [name, "Arn"]}
    assert rule["BucketKeyEnabled"] is True


@pytest.mark.parametrize("kind", ["S3::Bucket", "SQS::Queue", "SNS::Topic"])
def test_nothing_is_reached_without_tls(made, kind):
    policies = {"S3::Bucket": "Bucket", "SQS::Queue": "Queues", "SNS::Topic": "Topics"}
    for template in every(made):
        closed = []
        for policy in of_type(template, f"{kind}Policy").values():
            denied = [one for one in policy["PolicyDocument"]["Statement"] if one["Effect"] == "Deny"]
            assert any(one["Condition"] == {"Bool": {"aws:SecureTransport": "false"}} for one in denied)
            of_whom = policy[policies[kind]]
            closed += of_whom if isinstance(of_whom, list) else [of_whom]
        assert {next(iter(one.values())) if "Ref" in one else one["Fn::GetAtt"][0] for one in closed} == set(
            of_type(template, kind)
        )


def test_requests_and_answers_of_jobs_expire_and_results_do_not(both):
    rules = in_mode(both, "S3::Bucket", "Bucket")["LifecycleConfiguration"]["Rules"]
    assert all(rule["Status"] == "Enabled" for rule in rules)
    expiring = {rule.get("Prefix"): rule["ExpirationInDays"] for rule in rules if "ExpirationInDays" in rule}
    assert expiring == {"asynchronous/inputs/": 1, "asynchronous/outputs/": 7, "asynchronous/failures/": 7}
    (of_inputs,) = [rule for rule in rules if rule.get("Prefix") == "asynchronous/inputs/"]
    assert of_inputs["NoncurrentVersionExpiration"] == {"NoncurrentDays": 1}
    (everywhere,) = [rule for rule in rules if "Prefix" not in rule]
    assert everywhere["NoncurrentVersionExpiration"] == {"NoncurrentDays": 30}
    assert everywhere["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 1}
    assert everywhere["ExpiredObjectDeleteMarker"] is True


def test_what_jobs_left_expires_where_there_is_no_asynchronous_endpoint_any_more(made, both):
    rules = in_mode(made.template("default"), "S3::Bucket", "Bucket")["LifecycleConfiguration"]["Rules"]
    assert sum(rule.get("Prefix", "").startswith("asynchronous/") for rule in rules) == 3
    assert rules == in_mode(both, "S3::Bucket", "Bucket")["LifecycleConfiguration"]["Rules"]


def test_accesses_to_the_pictures_are_logged(both):
    logging = in_mode(both, "S3::Bucket", "Bucket")["LoggingConfiguration"]
    assert logging["DestinationBucketName"]["Ref"].startswith("AccessLogs")
    assert not any("AccessControl" in bucket for bucket in of_type(both, "S3::Bucket").values())


def test_messages_are_encrypted_and_what_nobody_can_read_goes_to_a_queue_with_an_alarm(both):
    queues = of_type(both, "SQS::Queue")
    (key,) = of_type(both, "KMS::Key")
    assert all(queue["KmsMasterKeyId"] == {"Fn::GetAtt": [key, "Arn"]} for queue in queues.values())
    dead = {
        queue["RedrivePolicy"]["deadLetterTargetArn"]["Fn::GetAtt"][0]
        for queue in queues.values()
        if "RedrivePolicy" in queue
    }
    assert len(queues) == 4
    assert len(dead) == 2
    watched = {
        dimension["Value"]["Fn::GetAtt"][0]
        for alarm in of_type(both, "CloudWatch::Alarm").values()
        for dimension in alarm.get("Dimensions", ())
        if alarm.get("MetricName") == "ApproximateNumberOfMessagesVisible"
    }
    assert watched == dead


def test_every_topic_is_encrypted(made):
    for template in every(made):
        assert all("KmsMasterKeyId" in topic for topic in of_type(template, "SNS::Topic").values())


# --- who may do what


def test_no_action_and_no_resource_of_a_role_is_everything(made):
    for template in every(made):
        for statement in role_statements(template):
            assert statement["Effect"] == "Allow"
            assert not any("*" in action for action in statement["Action"])
            if "*" in statement["Resource"]:
                assert set(statement["Action"]) <= WITHOUT_RESOURCE


def test_metrics_are_put_into_one_namespace(made):
    for template in every(made):
        (statement,) = [one for one in role_statements(template) if "cloudwatch:PutMetricData" in one["Action"]]
        assert statement["Condition"] == {"StringEquals": {"cloudwatch:namespace": "/aws/sagemaker/Endpoints"}}


def test_no_role_has_a_managed_policy_and_only_sagemaker_takes_it(made):
    for template in every(made):
        role = only(of_type(template, "IAM::Role"))
        assert "ManagedPolicyArns" not in role
        (trust,) = role["AssumeRolePolicyDocument"]["Statement"]
        assert trust["Principal"] == {"Service": "sagemaker.amazonaws.com"}
        assert not of_type(template, "IAM::User")


def s3_grants(template):
    """Which actions are allowed on objects whose key begins how (bucket's logical id or name, rest)."""
    grants = set()
    for statement in role_statements(template):
        for action in statement["Action"]:
            if action.startswith("s3:"):
                grants |= {(action, json.dumps(where, sort_keys=True)) for where in statement["Resource"]}
    return grants


def test_objects_are_reached_below_users_and_jobs_only(both):
    (bucket,) = [name for name in of_type(both, "S3::Bucket") if name.startswith("Bucket")]
    arn = {"Fn::GetAtt": [bucket, "Arn"]}
    weights = ["arn:", {"Ref": "AWS::Partition"}, ":s3:::shop-weights"]

    def at(*parts):
        return json.dumps({"Fn::Join": ["", list(parts)]}, sort_keys=True)

    assert s3_grants(both) == {
        ("s3:GetObject", at(arn, "/users/*")),
        ("s3:PutObject", at(arn, "/users/*")),
        ("s3:ListBucket", json.dumps(arn)),
        ("s3:GetObject", at(*weights[:-1], ":s3:::shop-weights/catvton/mix/*")),
        ("s3:ListBucket", at(*weights)),
        ("s3:GetObject", at(arn, "/asynchronous/inputs/*")),
        ("s3:PutObject", at(arn, "/asynchronous/outputs/*")),
        ("s3:AbortMultipartUpload", at(arn, "/asynchronous/outputs/*")),
        ("s3:PutObject", at(arn, "/asynchronous/failures/*")),
        ("s3:AbortMultipartUpload", at(arn, "/asynchronous/failures/*")),
    }


def test_a_missing_key_can_be_asked_for(both):
    """HEAD says 404 only to who may list the bucket without a condition."""
    (bucket,) = [name for name in of_type(both, "S3::Bucket") if name.startswith("Bucket")]
    (statement,) = [one for one in role_statements(both) if one["Resource"] == [{"Fn::GetAtt": [bucket, "Arn"]}]]
    assert statement["Action"] == ["s3:ListBucket"]
    assert "Condition" not in statement


def test_a_prefix_of_keys_narrows_the_role_too(made):
    granted = [where for action, where in s3_grants(made.template("network")) if action == "s3:PutObject"]
    assert any("/pictures/users/*" in where for where in granted)
    assert not any('"/users/*"' in where for where in granted)


def test_the_model_waits_for_the_roles_policy(made):
    for template in every(made):
        (policy,) = of_type(template, "IAM::Policy")
        models = [one for one in template["Resources"].values() if one["Type"] == "AWS::SageMaker::Model"]
        assert all(policy in one["DependsOn"] for one in models)


def test_the_largest_role_fits_into_the_one_policy_that_models_wait_for(made):
    """Else the CDK makes a managed policy of the rest, for which no model waits."""
    template = made.template("largest")
    assert not of_type(template, "IAM::ManagedPolicy")
    (policy,) = of_type(template, "IAM::Policy")
    models = [one for one in template["Resources"].values() if one["Type"] == "AWS::SageMaker::Model"]
    assert [policy in one["DependsOn"] for one in models] == [True, True]
    (statement,) = [one for one in role_statements(template) if "subnet/" in json.dumps(one["Resource"])]
    assert set(statement["Action"]) == {
        f"ec2:{verb}NetworkInterface{what}" for verb in ("Create", "Delete") for what in ("", "Permission")
    }
    assert all(f":subnet/{name}" in json.dumps(statement["Resource"]) for name in LARGEST["subnet_ids"])


# --- the container


def test_every_variable_is_one_that_the_container_knows(made):
    for template in every(made):
        for model in of_type(template, "SageMaker::Model").values():
            written = model["PrimaryContainer"]["Environment"]
            environ = {
                name: value if isinstance(value, str) else "https://sqs.example" for name, value in written.items()
            }
            environ[f"{PREFIX}BUCKET"] = "results"
            assert Settings.from_env(environ).require_a_place_for_results().bucket == "results"


def test_the_container_writes_where_the_role_may(both):
    written = variables_of(both, "realtime")
    assert written["VTON_BUCKET"]["Ref"].startswith("Bucket")
    assert written["VTON_QUEUE_URL"]["Ref"].startswith("Results")
    assert written["VTON_MASK_QUEUE_URL"]["Ref"].startswith("Masks")
    sends = [one for one in role_statements(both) if "sqs:SendMessage" in one["Action"]]
    assert {arn["Fn::GetAtt"][0] for one in sends for arn in one["Resource"]} == {
        written["VTON_QUEUE_URL"]["Ref"],
        written["VTON_MASK_QUEUE_URL"]["Ref"],
    }
    assert written["AWS_DEFAULT_REGION"] == {"Ref": "AWS::Region"}


def test_all_containers_of_a_deployment_hash_users_with_one_secret_that_nobody_has_written_down(both):
    (name,) = of_type(both, "SecretsManager::Secret")
    salt = {"Fn::Join": ["", ["{{resolve:secretsmanager:", {"Ref": name}, ":SecretString:::}}"]]}
    assert [variables_of(both, mode)["VTON_LOG_SALT"] for mode in ("realtime", "asynchronous")] == [salt, salt]
    generated = both["Resources"][name]["Properties"]["GenerateSecretString"]
    assert generated["ExcludePunctuation"] is True
    assert Settings(log_salt="x" * generated.get("PasswordLength", 32))
    assert "SecretString" not in both["Resources"][name]["Properties"]
    assert both["Resources"][name]["DeletionPolicy"] == "Delete"


def test_a_salt_of_the_context_is_used_and_no_other_made(made):
    template = made.template("jobs")
    assert not of_type(template, "SecretsManager::Secret")
    assert variables_of(template, "asynchronous")["VTON_LOG_SALT"] == CONTEXTS["jobs"]["settings"]["VTON_LOG_SALT"]


def test_deadlines_fit_the_platforms(both):
    assert float(variables_of(both, "realtime")["VTON_DEADLINE_S"]) < 60
    assert float(variables_of(both, "asynchronous")["VTON_DEADLINE_S"]) < 900


def test_settings_of_the_context_arrive(both):
    assert variables_of(both, "realtime")["VTON_STEPS"] == "30"
    assert variables_of(both, "asynchronous")["VTON_IMAGE_HOSTS"] == "images.shop.example"


def test_weights_come_as_they_lie_in_s3(made, both):
    container = in_mode(both, "SageMaker::Model", "realtime")["PrimaryContainer"]
    assert container["ModelDataSource"] == {
        "S3DataSource": {
            "CompressionType": "None",
            "S3DataType": "S3Prefix",
            "S3Uri": "s3://shop-weights/catvton/mix/",
        }
    }
    assert container["Environment"]["VTON_WEIGHTS"] == "/opt/ml/model"
    for context, weights in (("default", "embedded"), ("network", None)):
        container = in_mode(made.template(context), "SageMaker::Model", "realtime")["PrimaryContainer"]
        assert "ModelDataSource" not in container
        assert container["Environment"].get("VTON_WEIGHTS") == weights


def test_a_given_image_is_pulled_from_its_repository(both):
    assert in_mode(both, "SageMaker::Model", "realtime")["PrimaryContainer"]["Image"] == IMAGE
    (pull,) = [one for one in role_statements(both) if "ecr:BatchGetImage" in one["Action"]]
    assert ending(pull["Resource"][0]) == ":ecr:eu-central-1:123456789012:repository/shop/vton"


def test_without_one_the_repositorys_own_is_built_from_what_it_needs(made):
    assets = json.loads((made.folder / "default" / "vton.assets.json").read_text())
    (image,) = assets["dockerImages"].values()
    assert image["source"]["dockerBuildTarget"] == "sagemaker"
    assert image["source"]["platform"] == "linux/amd64"
    carried = {path.name for path in (made.folder / "default" / image["source"]["directory"]).iterdir()}
    assert {"Dockerfile", "container", "model", "requirements"} <= carried
    assert not {"tests", "bench", ".venv", ".git", "cdk.out"} & carried
    assert (
        "dockerImages" not in json.loads((made.folder / "two" / "vton.assets.json").read_text())
        or not json.loads((made.folder / "two" / "vton.assets.json").read_text())["dockerImages"]
    )


# --- endpoints


def test_nothing_that_is_replaced_has_a_name_of_its_own(made):
    for template in every(made):
        for name, resource in template["Resources"].items():
            kind = resource["Type"].rpartition("::")[2]
            named = {key for key in resource.get("Properties", {}) if PHYSICAL_NAMES.fullmatch(key)}
            if kind in ("Policy", "Endpoint", "ScalingPolicy"):  # a reference, or named after the stack
                named -= {"PolicyName", "EndpointConfigName"}
            assert named == set(), name


def test_two_stacks_share_no_name(made):
    names = []
    for stack in ("vton", "shop"):
        template = made.template("two", stack)
        endpoints = {one["EndpointName"] for one in of_type(template, "SageMaker::Endpoint").values()}
        groups = {one["LogGroupName"] for one in of_type(template, "Logs::LogGroup").values()}
        policies = {one["PolicyName"] for one in of_type(template, "ApplicationAutoScaling::ScalingPolicy").values()}
        spaces = {variables_of(template, mode)["VTON_METRICS_NAMESPACE"] for mode in ("realtime", "asynchronous")}
        assert endpoints == {f"{stack}-realtime", f"{stack}-asynchronous"}
        assert groups == {f"/aws/sagemaker/Endpoints/{endpoint}" for endpoint in endpoints}
        assert spaces == {f"vton/{endpoint}" for endpoint in endpoints}
        names.append(endpoints | groups | policies | spaces)
    assert not names[0] & names[1]
    assert "Export" not in json.dumps(made.template("two")["Outputs"])


@pytest.mark.parametrize("context", ["default", "jobs"])
def test_another_instance_image_or_mode_leaves_the_bucket_and_the_queues_as_they_are(made, both, context):
    for kind in ("S3::Bucket", "SQS::Queue", "KMS::Key"):
        assert of_type(made.template(context), kind) == of_type(both, kind)


def variant_of(template, mode):
    (variant,) = in_mode(template, "SageMaker::EndpointConfig", mode)["ProductionVariants"]
    return variant


@pytest.mark.parametrize("mode", ["realtime", "asynchronous"])
def test_an_instance_has_time_to_start_and_a_driver_that_does_not_change(both, mode):
    variant = variant_of(both, mode)
    assert variant["InstanceType"] == "ml.g6.xlarge"
    assert variant["ContainerStartupHealthCheckTimeoutInSeconds"] == 900
    assert variant["ModelDataDownloadTimeoutInSeconds"] == 1200
    assert variant["InferenceAmiVersion"] == "al2-ami-sagemaker-inference-gpu-3-1"
    assert variant["RoutingConfig"] == {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"}


def test_the_realtime_endpoint_has_two_instances_and_follows_requests_of_ten_seconds(made):
    template = made.template("default")
    assert variant_of(template, "realtime")["InitialInstanceCount"] == 2
    target = only(of_type(template, "ApplicationAutoScaling::ScalableTarget"))
    assert (target["MinCapacity"], target["MaxCapacity"]) == (2, 4)
    assert target["ResourceId"] == "endpoint/vton-realtime/variant/primary"
    policy = only(of_type(template, "ApplicationAutoScaling::ScalingPolicy"))
    tracking = policy["TargetTrackingScalingPolicyConfiguration"]
    assert tracking["TargetValue"] == 2
    assert tracking["PredefinedMetricSpecification"] == {
        "PredefinedMetricType": "SageMakerVariantConcurrentRequestsPerModelHighResolution"
    }


def test_the_number_of_instances_survives_an_update(made):
    for template in every(made):
        for endpoint in of_type(template, "SageMaker::Endpoint").values():
            assert endpoint["RetainAllVariantProperties"] is True
        for resource in template["Resources"].values():
            if resource["Type"] == "AWS::ApplicationAutoScaling::ScalableTarget":
                assert any("Endpoint" in name for name in resource["DependsOn"])


def test_a_new_version_is_tried_on_one_instance_and_taken_back_on_an_alarm(made):
    template = made.template("two")
    alarms = of_type(template, "CloudWatch::Alarm")
    for mode, routing in (("realtime", "CANARY"), ("asynchronous", "ALL_AT_ONCE")):
        deployment = in_mode(template, "SageMaker::Endpoint", mode)["DeploymentConfig"]
        traffic = deployment["BlueGreenUpdatePolicy"]["TrafficRoutingConfiguration"]
        assert traffic["Type"] == routing
        assert traffic["WaitIntervalInSeconds"] == 600
        assert traffic.get("CanarySize") == ({"Type": "INSTANCE_COUNT", "Value": 1} if routing == "CANARY" else None)
        names = [alarm["AlarmName"]["Ref"] for alarm in deployment["AutoRollbackConfiguration"]["Alarms"]]
        assert 1 <= len(names) <= 10
        assert set(names) <= set(alarms)
        allowed = {
            arn["Fn::GetAtt"][0]
            for one in role_statements(template)
            if one["Action"] == ["cloudwatch:DescribeAlarms"]
            for arn in one["Resource"]
        }
        assert set(names) <= allowed


def test_an_update_may_take_what_its_parts_may(made):
    for template in every(made):
        for name, endpoint in of_type(template, "SageMaker::Endpoint").items():
            policy = endpoint["DeploymentConfig"]["BlueGreenUpdatePolicy"]
            mode = name[: name.index("Endpoint")]
            (variant,) = in_mode(template, "SageMaker::EndpointConfig", mode)["ProductionVariants"]
            parts = (
                variant["ModelDataDownloadTimeoutInSeconds"],
                variant["ContainerStartupHealthCheckTimeoutInSeconds"],
                2 * policy["TrafficRoutingConfiguration"]["WaitIntervalInSeconds"],
                policy["TerminationWaitInSeconds"],
            )
            assert sum(parts) + 3600 == policy["MaximumExecutionTimeoutInSeconds"] <= 28_800


def test_one_instance_is_no_canary(made):
    endpoint = in_mode(made.template("network"), "SageMaker::Endpoint", "realtime")
    traffic = endpoint["DeploymentConfig"]["BlueGreenUpdatePolicy"]["TrafficRoutingConfiguration"]
    assert traffic["Type"] == "ALL_AT_ONCE"
    assert "CanarySize" not in traffic


def test_the_asynchronous_endpoint_goes_to_zero_and_comes_back(both):
    target = in_mode(both, "ApplicationAutoScaling::ScalableTarget", "asynchronous")
    assert (target["MinCapacity"], target["MaxCapacity"]) == (0, 2)
    policies = {
        policy["PolicyType"]: (name, policy)
        for name, policy in of_type(both, "ApplicationAutoScaling::ScalingPolicy").items()
        if name.startswith("asynchronous")
    }
    _, following = policies["TargetTrackingScaling"]
    metric = following["TargetTrackingScalingPolicyConfiguration"]["CustomizedMetricSpecification"]
    assert metric["MetricName"] == "ApproximateBacklogSizePerInstance"
    assert metric["Dimensions"] == [{"Name": "EndpointName", "Value": "vton-asynchronous"}]
    name, stepping = policies["StepScaling"]
    (step,) = stepping["StepScalingPolicyConfiguration"]["StepAdjustments"]
    assert step == {"MetricIntervalLowerBound": 0, "ScalingAdjustment": 1}
    (alarm,) = [
        alarm for alarm in of_type(both, "CloudWatch::Alarm").values() if alarm.get("AlarmActions") == [{"Ref": name}]
    ]
    assert (alarm["MetricName"], alarm["Threshold"]) == ("HasBacklogWithoutCapacity", 1)
    assert alarm["Dimensions"] == [{"Name": "EndpointName", "Value": "vton-asynchronous"}]


def test_jobs_are_answered_in_the_bucket_and_told_of_on_encrypted_topics(both):
    configuration = in_mode(both, "SageMaker::EndpointConfig", "asynchronous")["AsyncInferenceConfig"]
    output = configuration["OutputConfig"]
    assert ending(output["S3OutputPath"]) == "/asynchronous/outputs/"
    assert ending(output["S3FailurePath"]) == "/asynchronous/failures/"
    assert output["KmsKeyId"]["Fn::GetAtt"][0] in of_type(both, "KMS::Key")
    topics = {output["NotificationConfig"][name]["Ref"] for name in ("SuccessTopic", "ErrorTopic")}
    assert len(topics) == 2
    assert topics <= set(of_type(both, "SNS::Topic"))
    (publish,) = [one for one in role_statements(both) if one["Action"] == ["sns:Publish"]]
    assert {arn["Ref"] for arn in publish["Resource"]} == topics
    assert "AsyncInferenceConfig" not in in_mode(both, "SageMaker::EndpointConfig", "realtime")


def test_a_job_finds_a_place_while_those_that_timed_out_keep_theirs(both):
    configuration = in_mode(both, "SageMaker::EndpointConfig", "asynchronous")["AsyncInferenceConfig"]
    sent_at_once = configuration["ClientConfig"]["MaxConcurrentInvocationsPerInstance"]
    assert sent_at_once == 6
    assert int(variables_of(both, "asynchronous")["VTON_MAX_IN_FLIGHT"]) == 2 * sent_at_once
    assert variables_of(both, "realtime")["VTON_MAX_IN_FLIGHT"] == "6"


def test_volumes_are_encrypted_with_the_key_where_that_is_asked_for(made, both):
    template = made.template("network")
    (key,) = of_type(template, "KMS::Key")
    for configuration in of_type(template, "SageMaker::EndpointConfig").values():
        assert configuration["KmsKeyId"] == {"Fn::GetAtt": [key, "Arn"]}
    (statement,) = [one for one in role_statements(template) if one["Action"] == ["kms:CreateGrant"]]
    assert statement["Condition"] == {"Bool": {"kms:GrantIsForAWSResource": "true"}}
    assert all("KmsKeyId" not in one for one in of_type(both, "SageMaker::EndpointConfig").values())
    assert not any("kms:CreateGrant" in one["Action"] for one in role_statements(both))


def test_in_a_vpc_https_goes_out_and_nothing_comes_in(made, both):
    template = made.template("network")
    group = only(of_type(template, "EC2::SecurityGroup"))
    allowed = group["SecurityGroupEgress"]
    assert all((out["IpProtocol"], out["FromPort"], out["ToPort"]) == ("tcp", 443, 443) for out in allowed)
    assert [out.get("CidrIp", out.get("CidrIpv6")) for out in allowed] == ["10.0.0.0/8", "2001:db8::/32"]
    assert "SecurityGroupIngress" not in group
    assert not of_type(template, "EC2::SecurityGroupIngress")
    for model in of_type(template, "SageMaker::Model").values():
        assert model["VpcConfig"]["Subnets"] == ["subnet-0123456789abcdef0", "subnet-0123456789abcdef1"]
        assert len(model["VpcConfig"]["SecurityGroupIds"]) == 1
    for model in of_type(both, "SageMaker::Model").values():
        assert "VpcConfig" not in model
        assert model.get("EnableNetworkIsolation", False) is False


def test_an_asynchronous_endpoint_stands_alone(made):
    template = made.template("jobs")
    endpoint = only(of_type(template, "SageMaker::Endpoint"))
    assert endpoint["EndpointName"] == "vton-asynchronous"
    assert only(of_type(template, "ApplicationAutoScaling::ScalableTarget"))["MinCapacity"] == 1


def test_an_existing_bucket_and_existing_queues_are_used_and_left_as_they_are(made):
    template = made.template("takeover")
    for kind in ("S3::Bucket", "S3::BucketPolicy", "SQS::Queue", "SQS::QueuePolicy"):
        assert not of_type(template, kind)
    for mode in ("realtime", "asynchronous"):
        written = variables_of(template, mode)
        assert written["VTON_BUCKET"] == OLD_BUCKET
        urls = [written["VTON_QUEUE_URL"], written["VTON_MASK_QUEUE_URL"]]
        assert [ending(url) for url in urls] == ["/123456789012/old-results", "/123456789012/old-masks"]
    output = in_mode(template, "SageMaker::EndpointConfig", "asynchronous")["AsyncInferenceConfig"]["OutputConfig"]
    assert output["S3OutputPath"] == f"s3://{OLD_BUCKET}/asynchronous/outputs/"
    ages = [
        alarm["Dimensions"][0]["Value"]
        for alarm in of_type(template, "CloudWatch::Alarm").values()
        if alarm.get("MetricName") == "ApproximateAgeOfOldestMessage"
    ]
    assert ages == ["old-results", "old-masks"]


def test_the_role_may_do_as_much_in_an_existing_bucket_and_queues_as_in_new_ones(made):
    template, new = made.template("takeover"), made.template("two")
    sends = [one["Resource"] for one in role_statements(template) if one["Action"] == ["sqs:SendMessage"]]
    assert sends == [OLD_QUEUES]
    arn = f":s3:::{OLD_BUCKET}"
    at = {(action, ending(json.loads(where)).replace(arn, "")) for action, where in s3_grants(template)}
    (bucket,) = [name for name in of_type(new, "S3::Bucket") if name.startswith("Bucket")]
    own = {(action, where) for action, where in s3_grants(new) if bucket in where}
    assert all(arn in where for _, where in s3_grants(template))
    assert at == {(action, ending(json.loads(where)) if "Join" in where else "") for action, where in own}


# --- what is watched


def test_every_alarm_tells_the_operators_but_the_one_that_adds_an_instance(made):
    for template in every(made):
        (operators,) = [name for name in of_type(template, "SNS::Topic") if name.startswith("Operators")]
        for name, alarm in of_type(template, "CloudWatch::Alarm").items():
            if "JobWithoutInstance" not in name:
                assert alarm["AlarmActions"] == [{"Ref": operators}], name
                assert alarm["TreatMissingData"] == "notBreaching"


def test_cloudwatch_may_publish_to_the_encrypted_topic(both):
    (key,) = of_type(both, "KMS::Key").values()
    policies = [key["KeyPolicy"], *(one["PolicyDocument"] for one in of_type(both, "SNS::TopicPolicy").values())]
    allowed = [
        statement
        for policy in policies
        for statement in policy["Statement"]
        if statement["Principal"] == {"Service": "cloudwatch.amazonaws.com"}
    ]
    assert {
        action for one in allowed for action in ([one["Action"]] if isinstance(one["Action"], str) else one["Action"])
    } == {
        "kms:Decrypt",
        "kms:GenerateDataKey",
        "sns:Publish",
    }
    assert all(
        one["Condition"] == {"StringEquals": {"aws:SourceAccount": {"Ref": "AWS::AccountId"}}} for one in allowed
    )


def own_metrics_of_alarms(template):
    """(namespace, name, dimensions) of our metrics in alarms."""
    found = set()
    for alarm in of_type(template, "CloudWatch::Alarm").values():
        for query in alarm.get("Metrics", ()):
            metric = query.get("MetricStat", {}).get("Metric", {"Namespace": ""})
            if metric["Namespace"].startswith("vton/"):
                dimensions = tuple((one["Name"], one["Value"]) for one in metric["Dimensions"])
                found.add((metric["Namespace"], metric["MetricName"], dimensions))
    return found


def own_metrics_of_the_dashboard(template):
    """The same of the dashboard, whose body is text with references in it."""
    joined = only(of_type(template, "CloudWatch::Dashboard"))["DashboardBody"]["Fn::Join"][1]
    body = json.loads("".join(part if isinstance(part, str) else "X" for part in joined))
    found = set()
    for widget in body["widgets"]:
        for namespace, name, *rest in widget["properties"].get("metrics", ()):
            if isinstance(namespace, str) and namespace.startswith("vton/"):
                names = [part for part in rest if isinstance(part, str)]
                found.add((namespace, name, tuple(zip(names[::2], names[1::2]))))
    return found


def test_dashboard_and_alarms_read_exactly_what_the_container_writes(both):
    spaces = {variables_of(both, mode)["VTON_METRICS_NAMESPACE"] for mode in ("realtime", "asynchronous")}
    drawn, alarmed = own_metrics_of_the_dashboard(both), own_metrics_of_alarms(both)
    outcomes = {(space, "requests", ((OUTCOME, outcome),)) for space in spaces for outcome in OUTCOMES}
    times = {(space, name, ((OUTCOME, "done"),)) for space in spaces for name in METRIC_UNITS if name != "requests"}
    assert drawn == outcomes | times
    assert alarmed <= drawn
    assert {namespace for namespace, _, _ in alarmed} == spaces
    assert {dict(dimensions)[OUTCOME] for _, _, dimensions in alarmed} == {"done", "failed", "turned_away"}


@pytest.mark.parametrize(
    ("endpoint", "metrics"),
    [
        ("vton-realtime", {"Invocation5XXErrors", "ModelLatency"}),
        (
            "vton-asynchronous",
            {
                "ApproximateAgeOfOldestRequest",
                "HasBacklogWithoutCapacity",
                "ExpiredRequests",
                "InvocationFailures",
                "NotificationFailures",
            },
        ),
    ],
)
def test_the_platforms_troubles_have_alarms(both, endpoint, metrics):
    watched = set()
    for alarm in of_type(both, "CloudWatch::Alarm").values():
        single = (
            [{"MetricName": alarm["MetricName"], "Dimensions": alarm["Dimensions"]}] if "MetricName" in alarm else []
        )
        parts = [query["MetricStat"]["Metric"] for query in alarm.get("Metrics", ()) if "MetricStat" in query]
        for metric in (*single, *parts):
            if {"Name": "EndpointName", "Value": endpoint} in metric["Dimensions"]:
                watched.add(metric["MetricName"])
    assert metrics | {"DiskUtilization", "GPUMemoryUtilization", "MemoryUtilization"} <= watched


def test_a_deployment_says_where_its_parts_are(both):
    assert set(both["Outputs"]) == {
        "RealtimeEndpoint",
        "AsynchronousEndpoint",
        "BucketName",
        "KeyArn",
        "ResultsQueueUrl",
        "MasksQueueUrl",
        "RoleArn",
        "OperatorsTopicArn",
        "SucceededTopicArn",
        "FailedTopicArn",
        "JobInputs",
        "DashboardName",
    }


def test_every_graph_of_the_dashboard_says_of_which_endpoint(both):
    body = only(of_type(both, "CloudWatch::Dashboard"))["DashboardBody"]
    titles = re.findall(r'"title":"([^"]*)"', json.dumps(body).replace('\\"', '"'))
    assert len(titles) == len(set(titles)) > 6
    assert {title.partition(":")[0] for title in titles} == {"Alarms", "vton-realtime", "vton-asynchronous"}


def test_logs_do_not_stay_for_ever(made):
    for template in every(made):
        assert all(group["RetentionInDays"] == 30 for group in of_type(template, "Logs::LogGroup").values())


# --- what others look for


def test_cdk_nag_finds_nothing_and_each_exception_has_a_reason(made):
    findings = made.findings()
    assert len(findings) > 20 * len(made.paths())
    assert {finding["Compliance"] for finding in findings} == {"Compliant", "Suppressed"}
    for finding in findings:
        if finding["Compliance"] == "Suppressed":
            assert len(finding["Exception Reason"]) > 30
            one_wildcard = finding["Exception Reason"].startswith("[Resource::")  # each, not the whole rule
            no_rotation = finding["Resource ID"].endswith("/LogSalt/Resource")
            assert {"AwsSolutions-IAM5": one_wildcard, "AwsSolutions-SMG4": no_rotation}[finding["Rule ID"]]


def test_cfn_lint_finds_nothing(made):
    linter = Path(sys.executable).with_name("cfn-lint")
    paths = [str(path) for path in made.paths() if path.parent.name != "again"]
    done = subprocess.run([str(linter), *paths], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_context_that_is_tried_is_one_that_a_user_could_give():
    for context in (*CONTEXTS.values(), LARGEST):
        assert Plan.from_context(context)
