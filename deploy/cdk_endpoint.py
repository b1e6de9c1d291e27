"""One SageMaker endpoint: its model, its configuration, how it is replaced and how it grows and shrinks.

L1 constructs, for the L2 ones lack asynchronous endpoints, deployment guardrails, uncompressed weights, routing and the
pinned AMI. Models and configurations have no names of their own: each change replaces them.
"""

from __future__ import annotations

from dataclasses import dataclass

from aws_cdk import RemovalPolicy, Stack
from aws_cdk import aws_applicationautoscaling as scaling
from aws_cdk import aws_cloudwatch as cloudwatch
from aws_cdk import aws_iam as iam
from aws_cdk import aws_kms as kms
from aws_cdk import aws_logs as logs
from aws_cdk import aws_sagemaker as sagemaker
from aws_cdk import aws_sns as sns
from constructs import Construct

from container.settings import PREFIX
from deploy.cdk_alarms import VARIANT, namespace_of
from deploy.cdk_context import WEIGHTS_URI, Mode, Plan

ROUTING = "LEAST_OUTSTANDING_REQUESTS"  # a picture takes seconds: the next one goes where fewest wait
BAKE_S = 600  # of new instances, under the eyes of the alarms
END_OLD_AFTER_S = 300
PROVISIONED_WITHIN_S = 3600  # new instances, where the platform is short of them
FEWEST_FOR_A_CANARY = 2  # at most half of the instances may be one
GROW_AGAIN_AFTER_S = 60
SHRINK_AGAIN_AFTER_S = 300


@dataclass(frozen=True)
class Hosting:
    """What all endpoints of a stack share.

    Attributes:
        role: of the platform and the container.
        image: its URI.
        network: the VPC, or None for the platform's own.
        key: for answers of jobs, and volumes where the plan says so.
        variables: of the containers, as far as they are known only to the stack.
    """

    role: iam.Role
    image: str
    network: sagemaker.CfnModel.VpcConfigProperty | None
    key: kms.Key
    variables: dict[str, str]


@dataclass(frozen=True)
class JobPlaces:
    """Where asynchronous jobs end.

    Attributes:
        bucket: its name.
        prefix: of all keys of jobs; ends in "/".
        succeeded: topic of answered jobs.
        failed: topic of the others.
    """

    bucket: str
    prefix: str
    succeeded: sns.Topic
    failed: sns.Topic


class Endpoint(Construct):
    """An endpoint called `{stack}-{mode}`, and its log group.

    Args:
        scope: the stack.
        mode: which kind it is.
        plan: what to deploy.
        hosting: what it shares with others.
        jobs: where asynchronous jobs end; None for a real-time endpoint.
    """

    def __init__(self, scope: Stack, mode: Mode, *, plan: Plan, hosting: Hosting, jobs: JobPlaces | None) -> None:
        super().__init__(scope, mode)
        self.name = f"{scope.stack_name}-{mode}"
        self._plan, self._hosting, self._jobs = plan, hosting, jobs
        self._fewest, self._most = plan.instances(mode)
        group = self._make_log_group()
        own = {f"{PREFIX}METRICS_NAMESPACE": namespace_of(self.name)}
        model = self._make_model({**plan.variables(mode), **hosting.variables, **own})
        self._endpoint = sagemaker.CfnEndpoint(
            self,
            "Endpoint",
            endpoint_name=self.name,
            endpoint_config_name=self._make_configuration(model).attr_endpoint_config_name,
            retain_all_variant_properties=True,  # else an update puts the number of instances back
        )
        self._endpoint.node.add_dependency(group)
        self._scale()

    def roll_back_on(self, alarms: list[cloudwatch.Alarm]) -> None:
        """Replaces instances blue/green, and takes the old ones again where one of the alarms goes off."""
        self._grant([alarm.alarm_arn for alarm in alarms], "cloudwatch:DescribeAlarms")
        one = sagemaker.CfnEndpoint.CapacitySizeProperty(type="INSTANCE_COUNT", value=1)
        canary = self._fewest >= FEWEST_FOR_A_CANARY
        names = [sagemaker.CfnEndpoint.AlarmProperty(alarm_name=alarm.alarm_name) for alarm in alarms]
        self._endpoint.deployment_config = sagemaker.CfnEndpoint.DeploymentConfigProperty(
            auto_rollback_configuration=sagemaker.CfnEndpoint.AutoRollbackConfigProperty(alarms=names),
            blue_green_update_policy=sagemaker.CfnEndpoint.BlueGreenUpdatePolicyProperty(
                maximum_execution_timeout_in_seconds=self._replaced_within_s(),
                termination_wait_in_seconds=END_OLD_AFTER_S,
                traffic_routing_configuration=sagemaker.CfnEndpoint.TrafficRoutingConfigProperty(
                    type="CANARY" if canary else "ALL_AT_ONCE",
                    canary_size=one if canary else None,
                    wait_interval_in_seconds=BAKE_S,
                ),
            ),
        )

    def _replaced_within_s(self) -> int:
        """What an update takes at most where it goes well; the platform ends what takes longer."""
        started_s = PROVISIONED_WITHIN_S + self._plan.download_timeout_s + self._plan.health_check_timeout_s
        return started_s + 2 * BAKE_S + END_OLD_AFTER_S

    def _grant(self, resources: list[str], *actions: str) -> None:
        iam.Grant.add_to_principal(grantee=self._hosting.role, actions=list(actions), resource_arns=resources)

    def _make_log_group(self) -> logs.LogGroup:
        """The group that the platform would make otherwise, and keep for ever."""
        name = f"/aws/sagemaker/Endpoints/{self.name}"
        group = logs.LogGroup(
            self,
            "Logs",
            log_group_name=name,
            retention=logs.RetentionDays.ONE_MONTH,
            removal_policy=RemovalPolicy.DESTROY,
        )
        writes = ("CreateLogGroup", "CreateLogStream", "DescribeLogStreams", "PutLogEvents")
        self._grant([group.log_group_arn], *(f"logs:{verb}" for verb in writes))
        return group

    def _make_model(self, variables: dict[str, str]) -> sagemaker.CfnModel:
        source = None
        if WEIGHTS_URI.fullmatch(self._plan.weights):
            source = sagemaker.CfnModel.ModelDataSourceProperty(
                s3_data_source=sagemaker.CfnModel.S3DataSourceProperty(
                    compression_type="None", s3_data_type="S3Prefix", s3_uri=self._plan.weights
                )
            )
        model = sagemaker.CfnModel(
            self,
            "Model",
            execution_role_arn=self._hosting.role.role_arn,
            primary_container=sagemaker.CfnModel.ContainerDefinitionProperty(
                image=self._hosting.image, environment=variables, model_data_source=source
            ),
            vpc_config=self._hosting.network,
        )
        # The model names the role, but without its policy the platform may not pull the image yet.
        model.node.add_dependency(self._hosting.role.node.find_child("DefaultPolicy"))
        return model

    def _make_configuration(self, model: sagemaker.CfnModel) -> sagemaker.CfnEndpointConfig:
        variant = sagemaker.CfnEndpointConfig.ProductionVariantProperty(
            variant_name=VARIANT,
            model_name=model.attr_model_name,
            instance_type=self._plan.instance_type,
            initial_instance_count=max(1, self._fewest),
            initial_variant_weight=1,
            container_startup_health_check_timeout_in_seconds=self._plan.health_check_timeout_s,
            model_data_download_timeout_in_seconds=self._plan.download_timeout_s,
            inference_ami_version=self._plan.inference_ami,
            routing_config=sagemaker.CfnEndpointConfig.RoutingConfigProperty(routing_strategy=ROUTING),
        )
        return sagemaker.CfnEndpointConfig(
            self,
            "Configuration",
            production_variants=[variant],
            async_inference_config=None if self._jobs is None else self._answers(self._jobs),
            kms_key_id=self._hosting.key.key_arn if self._plan.encrypt_volume else None,
        )

    def _answers(self, jobs: JobPlaces) -> sagemaker.CfnEndpointConfig.AsyncInferenceConfigProperty:
        both = ["SUCCESS_NOTIFICATION_TOPIC", "ERROR_NOTIFICATION_TOPIC"]
        folder = f"s3://{jobs.bucket}/{jobs.prefix}"
        return sagemaker.CfnEndpointConfig.AsyncInferenceConfigProperty(
            client_config=sagemaker.CfnEndpointConfig.AsyncInferenceClientConfigProperty(
                max_concurrent_invocations_per_instance=self._plan.max_in_flight
            ),
            output_config=sagemaker.CfnEndpointConfig.AsyncInferenceOutputConfigProperty(
                kms_key_id=self._hosting.key.key_arn,
                s3_output_path=f"{folder}outputs/",
                s3_failure_path=f"{folder}failures/",
                notification_config=sagemaker.CfnEndpointConfig.AsyncInferenceNotificationConfigProperty(
                    success_topic=jobs.succeeded.topic_arn,
                    error_topic=jobs.failed.topic_arn,
                    include_inference_response_in=both,
                ),
            ),
        )

    def _scale(self) -> None:
        target = scaling.CfnScalableTarget(
            self,
            "Instances",
            service_namespace="sagemaker",
            scalable_dimension="sagemaker:variant:DesiredInstanceCount",
            resource_id=f"endpoint/{self.name}/variant/{VARIANT}",
            min_capacity=self._fewest,
            max_capacity=self._most,
        )
        target.node.add_dependency(self._endpoint)
        if self._jobs is None:
            self._follow_requests(target)
        else:
            self._follow_backlog(target)
            self._leave_zero(target)

    def _follow_requests(self, target: scaling.CfnScalableTarget) -> None:
        metric = "SageMakerVariantConcurrentRequestsPerModelHighResolution"  # every 10 s
        configuration = scaling.CfnScalingPolicy.TargetTrackingScalingPolicyConfigurationProperty(
            target_value=self._plan.concurrent_requests_target,
            scale_out_cooldown=GROW_AGAIN_AFTER_S,
            scale_in_cooldown=SHRINK_AGAIN_AFTER_S,
            predefined_metric_specification=scaling.CfnScalingPolicy.PredefinedMetricSpecificationProperty(
                predefined_metric_type=metric
            ),
        )
        self._track(target, configuration)

    def _follow_backlog(self, target: scaling.CfnScalableTarget) -> None:
        of_this_endpoint = scaling.CfnScalingPolicy.MetricDimensionProperty(name="EndpointName", value=self.name)
        configuration = scaling.CfnScalingPolicy.TargetTrackingScalingPolicyConfigurationProperty(
            target_value=self._plan.backlog_target,
            scale_out_cooldown=GROW_AGAIN_AFTER_S,
            scale_in_cooldown=SHRINK_AGAIN_AFTER_S,
            customized_metric_specification=scaling.CfnScalingPolicy.CustomizedMetricSpecificationProperty(
                namespace="AWS/SageMaker",
                metric_name="ApproximateBacklogSizePerInstance",
                dimensions=[of_this_endpoint],
                statistic="Average",
            ),
        )
        self._track(target, configuration)

    def _track(
        self,
        target: scaling.CfnScalableTarget,
        configuration: scaling.CfnScalingPolicy.TargetTrackingScalingPolicyConfigurationProperty,
    ) -> None:
        scaling.CfnScalingPolicy(
            self,
            "Follow",
            policy_name=f"{self.name}-follow",
            policy_type="TargetTrackingScaling",
            scaling_target_id=target.ref,
            target_tracking_scaling_policy_configuration=configuration,
        )

    def _leave_zero(self, target: scaling.CfnScalableTarget) -> None:
        """One instance as soon as a job waits and there is none: a backlog per instance says nothing of that."""
        policy = scaling.CfnScalingPolicy(
            self,
            "LeaveZero",
            policy_name=f"{self.name}-leave-zero",
            policy_type="StepScaling",
            scaling_target_id=target.ref,
            step_scaling_policy_configuration=scaling.CfnScalingPolicy.StepScalingPolicyConfigurationProperty(
                adjustment_type="ChangeInCapacity",
                cooldown=SHRINK_AGAIN_AFTER_S,
                metric_aggregation_type="Average",
                step_adjustments=[
                    scaling.CfnScalingPolicy.StepAdjustmentProperty(metric_interval_lower_bound=0, scaling_adjustment=1)
                ],
            ),
        )
        cloudwatch.CfnAlarm(
            self,
            "JobWithoutInstance",
            alarm_description="Not for people: adds the first instance",
            namespace="AWS/SageMaker",
            metric_name="HasBacklogWithoutCapacity",
            dimensions=[cloudwatch.CfnAlarm.DimensionProperty(name="EndpointName", value=self.name)],
            statistic="Average",
            period=60,
            evaluation_periods=2,
            datapoints_to_alarm=2,
            threshold=1,
            comparison_operator="GreaterThanOrEqualToThreshold",
            treat_missing_data="missing",
            alarm_actions=[policy.ref],
        )
