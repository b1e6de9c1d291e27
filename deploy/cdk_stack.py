"""The service in an AWS account: bucket, queues, role, network, and an endpoint for each mode.

Physical names are CloudFormation's own, so that two stacks fit beside each other and whatever has to be replaced can
be; only endpoints are named, after their stack, for callers and alarms know them by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from aws_cdk import CfnOutput, Duration, RemovalPolicy, Stack
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_ecr as ecr
from aws_cdk import aws_ecr_assets as ecr_assets
from aws_cdk import aws_iam as iam
from aws_cdk import aws_kms as kms
from aws_cdk import aws_s3 as s3
from aws_cdk import aws_sagemaker as sagemaker
from aws_cdk import aws_secretsmanager as secretsmanager
from aws_cdk import aws_sns as sns
from aws_cdk import aws_sns_subscriptions as subscriptions
from aws_cdk import aws_sqs as sqs
from cdk_nag import NagPackSuppression, NagSuppressions, RegexAppliesTo
from constructs import Construct

from container.settings import PREFIX
from deploy.cdk_alarms import INSTANCES, Watch
from deploy.cdk_context import ASYNCHRONOUS, DOCKERFILE, IMAGE, JOBS, WEIGHTS_URI, Plan
from deploy.cdk_endpoint import Endpoint, Hosting, JobPlaces

REPOSITORY = DOCKERFILE.parent
TARGET = "sagemaker"  # of the Dockerfile
INPUTS, ANSWERS = f"{JOBS}inputs/", (f"{JOBS}outputs/", f"{JOBS}failures/")
INPUT_DAYS = 1  # the fewest that there are; a job waits for 6 hours at most
NONCURRENT_DAYS = 30  # an object that was deleted is gone for good after so many
ACCESS_LOG_DAYS = 90
MESSAGE_DAYS = 14
CLOUDWATCH = "cloudwatch.amazonaws.com"
LOG_SALT = f"{PREFIX}LOG_SALT"
LOG_BY_POLICY = "@aws-cdk/aws-s3:serverAccessLogsUseBucketPolicy"  # ACLs are off


@dataclass(frozen=True)
class Queues:
    """Where the service tells of finished pictures and masks, and where undeliverable messages of new queues end."""

    results: sqs.IQueue
    masks: sqs.IQueue
    dead: list[sqs.IQueue]


class VtonStack(Stack):
    """All of one deployment.

    Args:
        scope: the app.
        name: the stack's; its endpoints are called `{name}-realtime` and `{name}-asynchronous`.
        plan: what to deploy.
    """

    def __init__(self, scope: Construct, name: str, *, plan: Plan) -> None:
        super().__init__(scope, name, description="Virtual try-on endpoint", analytics_reporting=False)
        self.node.set_context(LOG_BY_POLICY, True)
        self._plan = plan
        self.key = self._make_key()
        self.bucket = self._make_bucket()
        self.queues = self._make_queues()
        self.operators = self._make_operators()
        self.role = self._make_role()
        watch = Watch(self, self.operators)
        watch.queues(taken=[self.queues.results, self.queues.masks], dead=self.queues.dead)
        hosting = Hosting(self.role, self._image(), self._network(), self.key, self._variables())
        for mode in plan.modes:
            jobs = self._job_places() if mode == ASYNCHRONOUS else None
            endpoint = Endpoint(self, mode, plan=plan, hosting=hosting, jobs=jobs)
            endpoint.roll_back_on(watch.endpoint(endpoint.name, mode))
            CfnOutput(self, f"{mode.capitalize()}Endpoint", value=endpoint.name)
        watch.draw()
        self._tell_where()

    def _make_key(self) -> kms.Key:
        key = kms.Key(self, "Key", enable_key_rotation=True, removal_policy=RemovalPolicy.RETAIN)
        key.add_to_resource_policy(
            iam.PolicyStatement(
                sid="AlarmsReachEncryptedTopics",
                principals=[iam.ServicePrincipal(CLOUDWATCH)],
                actions=["kms:Decrypt", "kms:GenerateDataKey"],
                resources=["*"],  # in a key's policy: this key
                conditions={"StringEquals": {"aws:SourceAccount": self.account}},
            )
        )
        return key

    def _make_bucket(self) -> s3.IBucket:
        if self._plan.bucket is not None:
            return s3.Bucket.from_bucket_name(self, "Bucket", self._plan.bucket)
        return s3.Bucket(
            self,
            "Bucket",
            block_public_access=s3.BlockPublicAccess.BLOCK_ALL,
            encryption=s3.BucketEncryption.KMS,
            encryption_key=self.key,
            bucket_key_enabled=True,
            enforce_ssl=True,
            object_ownership=s3.ObjectOwnership.BUCKET_OWNER_ENFORCED,
            versioned=True,
            lifecycle_rules=[*self._expiries_of_jobs(), _tidying()],
            server_access_logs_bucket=self._make_access_logs(),
            server_access_logs_prefix="bucket/",
            removal_policy=RemovalPolicy.RETAIN,
        )

    def _make_access_logs(self) -> s3.Bucket:
        return s3.Bucket(
            self,
            "AccessLogs",
            block_public_access=s3.BlockPublicAccess.BLOCK_ALL,
            encryption=s3.BucketEncryption.S3_MANAGED,  # S3 delivers its logs with no other
            enforce_ssl=True,
            versioned=True,
            lifecycle_rules=[_expiry(ACCESS_LOG_DAYS), _tidying()],
            removal_policy=RemovalPolicy.RETAIN,
        )

    def _expiries_of_jobs(self) -> list[s3.LifecycleRule]:
        """Whatever the modes are: what jobs left is not to stay when their endpoint goes."""
        answers = [_expiry(self._plan.asynchronous_days, folder) for folder in ANSWERS]
        return [_expiry(INPUT_DAYS, INPUTS, noncurrent_days=INPUT_DAYS), *answers]

    def _make_queues(self) -> Queues:
        results, dead_results = self._queue("Results", self._plan.queue_arn)
        masks, dead_masks = self._queue("Masks", self._plan.mask_queue_arn)
        return Queues(results, masks, dead=[*dead_results, *dead_masks])

    def _queue(self, name: str, arn: str | None) -> tuple[sqs.IQueue, list[sqs.IQueue]]:
        """The queue of that ARN, or a new one, and with it the one of its undeliverable messages."""
        if arn is not None:
            return sqs.Queue.from_queue_arn(self, name, arn), []
        dead = self._make_queue(f"Dead{name}")
        return self._make_queue(name, dead), [dead]

    def _make_queue(self, name: str, dead: sqs.Queue | None = None) -> sqs.Queue:
        return sqs.Queue(
            self,
            name,
            encryption=sqs.QueueEncryption.KMS,
            encryption_master_key=self.key,
            enforce_ssl=True,
            retention_period=Duration.days(MESSAGE_DAYS),
            dead_letter_queue=None if dead is None else sqs.DeadLetterQueue(queue=dead, max_receive_count=5),
        )

    def _make_topic(self, name: str) -> sns.Topic:
        return sns.Topic(self, name, master_key=self.key, enforce_ssl=True)

    def _make_operators(self) -> sns.Topic:
        """Who is told of alarms. The topic's own policy takes the place of the default one, which let CloudWatch in."""
        topic = self._make_topic("Operators")
        topic.add_to_resource_policy(
            iam.PolicyStatement(
                sid="AlarmsPublish",
                principals=[iam.ServicePrincipal(CLOUDWATCH)],
                actions=["sns:Publish"],
                resources=[topic.topic_arn],
                conditions={"StringEquals": {"aws:SourceAccount": self.account}},
            )
        )
        if self._plan.alarm_email is not None:
            topic.add_subscription(subscriptions.EmailSubscription(self._plan.alarm_email))
        return topic

    def _make_role(self) -> iam.Role:
        """May do what the platform and the container need, and nothing else."""
        role = iam.Role(self, "Role", assumed_by=iam.ServicePrincipal("sagemaker.amazonaws.com"))
        results = self.bucket.arn_for_objects(f"{self._plan.key_prefix}users/*")
        self._grant(role, ["s3:GetObject", "s3:PutObject"], results)
        # Unconditional: without it, S3 answers 403 instead of 404 to the question whether a key is there.
        self._grant(role, ["s3:ListBucket"], self.bucket.bucket_arn)
        self._grant(role, ["sqs:SendMessage"], self.queues.results.queue_arn, self.queues.masks.queue_arn)
        self._grant(role, ["kms:Decrypt", "kms:GenerateDataKey"], self.key.key_arn)
        metrics = {"StringEquals": {"cloudwatch:namespace": INSTANCES}}
        self._grant_if(role, "cloudwatch:PutMetricData", "*", metrics)
        if self._plan.encrypt_volume:
            by_aws = {"Bool": {"kms:GrantIsForAWSResource": "true"}}
            self._grant_if(role, "kms:CreateGrant", self.key.key_arn, by_aws)
        weights = WEIGHTS_URI.fullmatch(self._plan.weights)
        if weights is not None:
            folder, prefix = f"arn:{self.partition}:s3:::{weights['bucket']}", weights["prefix"]
            self._grant(role, ["s3:GetObject"], f"{folder}/{prefix}*")
            self._grant_if(role, "s3:ListBucket", folder, {"StringLike": {"s3:prefix": f"{prefix}*"}})
        NagSuppressions.add_resource_suppressions(role, _wildcards(), apply_to_children=True)
        return role

    def _grant(self, role: iam.Role, actions: list[str], *resources: str) -> None:
        iam.Grant.add_to_principal(grantee=role, actions=actions, resource_arns=list(resources))

    def _grant_if(self, role: iam.Role, action: str, resource: str, conditions: dict[str, dict[str, str]]) -> None:
        role.add_to_principal_policy(iam.PolicyStatement(actions=[action], resources=[resource], conditions=conditions))

    def _image(self) -> str:
        """The image's URI; the role may pull it."""
        if self._plan.image is None:
            asset = ecr_assets.DockerImageAsset(
                self,
                "Image",
                directory=str(REPOSITORY),
                target=TARGET,
                platform=ecr_assets.Platform.LINUX_AMD64,
            )
            asset.repository.grant_pull(self.role)
            return str(asset.image_uri)
        match = IMAGE.fullmatch(self._plan.image)
        if match is None:
            raise ValueError("the plan has checked the image")
        arn = f"arn:{self.partition}:ecr:{match['region']}:{match['account']}:repository/{match['repository']}"
        ecr.Repository.from_repository_attributes(
            self, "Image", repository_arn=arn, repository_name=match["repository"]
        ).grant_pull(self.role)
        return self._plan.image

    def _network(self) -> sagemaker.CfnModel.VpcConfigProperty | None:
        """The VPC, if there is one: nothing comes in but from the platform, and https alone goes out, where it may."""
        if self._plan.vpc_id is None:
            return None
        group = ec2.CfnSecurityGroup(
            self,
            "Egress",
            group_description="The containers of the endpoint: https out, nothing in",
            vpc_id=self._plan.vpc_id,
            security_group_egress=[_https_to(cidr) for cidr in self._plan.egress_cidrs],
        )
        self._grant_interfaces(group)
        return sagemaker.CfnModel.VpcConfigProperty(
            security_group_ids=[group.attr_group_id], subnets=list(self._plan.subnet_ids)
        )

    def _grant_interfaces(self, group: ec2.CfnSecurityGroup) -> None:
        """In one statement: what does not fit into the role's policy the CDK puts into one that no model waits for."""
        own = [
            self.format_arn(service="ec2", resource="network-interface", resource_name="*"),
            self.format_arn(service="ec2", resource="security-group", resource_name=group.attr_group_id),
        ]
        own += [self.format_arn(service="ec2", resource="subnet", resource_name=name) for name in self._plan.subnet_ids]
        changed = ("NetworkInterface", "NetworkInterfacePermission")
        self._grant(self.role, [f"ec2:{verb}{thing}" for thing in changed for verb in ("Create", "Delete")], *own)
        looks = ("DhcpOptions", "NetworkInterfaces", "SecurityGroups", "Subnets", "Vpcs")
        self._grant(self.role, [f"ec2:Describe{thing}" for thing in looks], "*")

    def _variables(self) -> dict[str, str]:
        salt = {} if LOG_SALT in self._plan.settings else {LOG_SALT: self._make_salt()}
        return {
            f"{PREFIX}BUCKET": self.bucket.bucket_name,
            f"{PREFIX}QUEUE_URL": self.queues.results.queue_url,
            f"{PREFIX}MASK_QUEUE_URL": self.queues.masks.queue_url,
            "AWS_DEFAULT_REGION": self.region,
            **salt,
        }

    def _make_salt(self) -> str:
        """A reference to a new secret, which CloudFormation resolves for each model that it makes.

        It has the account's own key: the stack's would ask more rights of whoever deploys, and protect nothing more,
        for a model tells its variables.
        """
        secret = secretsmanager.Secret(
            self,
            "LogSalt",
            description="With which the ids of users are hashed for the log",
            generate_secret_string=secretsmanager.SecretStringGenerator(exclude_punctuation=True),
            removal_policy=RemovalPolicy.DESTROY,  # as that log is
        )
        reason = "Another salt would give every user another name in the log; nothing is reached with it."
        NagSuppressions.add_resource_suppressions(secret, [NagPackSuppression(id="AwsSolutions-SMG4", reason=reason)])
        return str(secret.secret_value.unsafe_unwrap())

    def _job_places(self) -> JobPlaces:
        """Where asynchronous jobs are read from and answered to."""
        places = JobPlaces(
            bucket=self.bucket.bucket_name,
            prefix=JOBS,
            succeeded=self._make_topic("Succeeded"),
            failed=self._make_topic("Failed"),
        )
        self._grant(self.role, ["s3:GetObject"], self.bucket.arn_for_objects(f"{INPUTS}*"))
        answers = ["s3:PutObject", "s3:AbortMultipartUpload"]
        for folder in ANSWERS:
            self._grant(self.role, answers, self.bucket.arn_for_objects(f"{folder}*"))
        self._grant(self.role, ["sns:Publish"], places.succeeded.topic_arn, places.failed.topic_arn)
        CfnOutput(self, "SucceededTopicArn", value=places.succeeded.topic_arn)
        CfnOutput(self, "FailedTopicArn", value=places.failed.topic_arn)
        CfnOutput(self, "JobInputs", value=f"s3://{places.bucket}/{INPUTS}")
        return places

    def _tell_where(self) -> None:
        for name, value in (
            ("BucketName", self.bucket.bucket_name),
            ("KeyArn", self.key.key_arn),
            ("ResultsQueueUrl", self.queues.results.queue_url),
            ("MasksQueueUrl", self.queues.masks.queue_url),
            ("RoleArn", self.role.role_arn),
            ("OperatorsTopicArn", self.operators.topic_arn),
        ):
            CfnOutput(self, name, value=value)


def _expiry(days: int, prefix: str | None = None, *, noncurrent_days: int | None = None) -> s3.LifecycleRule:
    old = None if noncurrent_days is None else Duration.days(noncurrent_days)
    return s3.LifecycleRule(prefix=prefix, expiration=Duration.days(days), noncurrent_version_expiration=old)


def _tidying() -> s3.LifecycleRule:
    """Of what nobody sees: deleted objects' versions, their markers, and uploads that were never finished."""
    return s3.LifecycleRule(
        abort_incomplete_multipart_upload_after=Duration.days(1),
        expired_object_delete_marker=True,
        noncurrent_version_expiration=Duration.days(NONCURRENT_DAYS),
    )


def _https_to(cidr: str) -> ec2.CfnSecurityGroup.EgressProperty:
    version = "cidr_ipv6" if ":" in cidr else "cidr_ip"
    return ec2.CfnSecurityGroup.EgressProperty(
        ip_protocol="tcp", from_port=443, to_port=443, description="https", **{version: cidr}
    )


def _wildcards() -> list[NagPackSuppression]:
    """Why a few names in the role's policy end in a star; any other one is an error."""
    reasons = {
        r"/^Resource::\*$/": "AWS ties ECR's login, CloudWatch's PutMetricData (held to one namespace here) and EC2's "
        "Describe calls to no resource.",
        r"/^Resource::(<Bucket\w+\.Arn>|arn:<AWS::Partition>:s3:::[^*]+)\/[^*]*\*$/": "Objects are named by a prefix.",
        r"/^Resource::arn:<AWS::Partition>:ec2:[^*]+:network-interface\/\*$/": "The platform makes the interfaces.",
    }
    return [
        NagPackSuppression(id="AwsSolutions-IAM5", reason=reason, applies_to=[RegexAppliesTo(regex=regex)])
        for regex, reason in reasons.items()
    ]
