"""What wakes somebody, and what they look at then: alarms and a dashboard on the platform's metrics and on ours.

Our metrics are those that `container.telemetry` writes into the log lines, under its names.
"""

from __future__ import annotations

from dataclasses import dataclass

from aws_cdk import CfnOutput, Duration, Stack
from aws_cdk import aws_cloudwatch as cloudwatch
from aws_cdk import aws_cloudwatch_actions as actions
from aws_cdk import aws_sns as sns
from aws_cdk import aws_sqs as sqs

from container.telemetry import COUNTED_STAGES, DONE, FAILED, OUTCOME, OUTCOMES, REQUESTS, TURNED_AWAY
from deploy.cdk_context import REALTIME, Mode

VARIANT = "primary"
PLATFORM, INSTANCES = "AWS/SageMaker", "/aws/sagemaker/Endpoints"
MINUTE, FIVE_MINUTES = Duration.minutes(1), Duration.minutes(5)
MAX_FAILED_PERCENT = 5
MAX_TURNED_AWAY_PERCENT = 5
MAX_LATENCY_US = 50_000_000  # the platform ends a call at 60 s
MAX_FULL_PERCENT = 90  # of one GPU, too, for no instance has several: the platform counts 100 for each
MAX_JOB_AGE_S = 1800
MAX_MESSAGE_AGE_S = 900
STUCK_MINUTES = 20  # an instance takes less, weights included


def namespace_of(endpoint: str) -> str:
    """Where the metrics of an endpoint's own log lines are."""
    return f"vton/{endpoint}"


@dataclass(frozen=True)
class Limit:
    """When a number is too high.

    Attributes:
        above: so high, or higher, is too high.
        periods: how many are looked at.
        of_them: so many must be too high.
    """

    above: float
    periods: int = 5
    of_them: int = 3


AT_ALL = Limit(1, 1, 1)


class Watch:
    """The alarms of a stack, all of which tell the operators, and its dashboard.

    Args:
        stack: whose.
        operators: the topic that is told.
    """

    def __init__(self, stack: Stack, operators: sns.Topic) -> None:
        self._stack = stack
        self._tell = actions.SnsAction(operators)
        self._alarms: list[cloudwatch.Alarm] = []
        self._rows: list[list[cloudwatch.IWidget]] = []

    def queues(self, taken: list[sqs.IQueue], dead: list[sqs.IQueue]) -> None:
        """Watches for messages that wait too long in `taken` queues, and for any message in `dead` ones."""
        for queue in dead:
            depth = queue.metric_approximate_number_of_messages_visible(period=FIVE_MINUTES)
            self._alarm(f"{queue.node.id}-messages", depth, AT_ALL)
        for queue in taken:
            age = queue.metric_approximate_age_of_oldest_message(period=FIVE_MINUTES)
            self._alarm(f"{queue.node.id}-age", age, Limit(MAX_MESSAGE_AGE_S))

    def endpoint(self, name: str, mode: Mode) -> list[cloudwatch.Alarm]:
        """Alarms and widgets of an endpoint.

        Returns:
            The alarms on which new instances are taken back.
        """
        failed = self._alarm(f"{mode}-failed", _share(name, FAILED), Limit(MAX_FAILED_PERCENT))
        self._alarm(f"{mode}-turned-away", _share(name, TURNED_AWAY), Limit(MAX_TURNED_AWAY_PERCENT))
        for metric in ("DiskUtilization", "MemoryUtilization", "GPUMemoryUtilization"):
            self._alarm(f"{mode}-{metric}", _instances(name, metric), Limit(MAX_FULL_PERCENT))
        if mode == REALTIME:
            also = self._realtime(name)
            work = _graph(
                f"{name}: calls", [_platform(name, "Invocations"), _platform(name, "ConcurrentRequestsPerModel", "max")]
            )
        else:
            also = self._asynchronous(name)
            sizes = [_of_endpoint(name, f"ApproximateBacklogSize{of}") for of in ("", "PerInstance")]
            work = _graph(f"{name}: jobs", sizes)
        self._rows += [self._own_row(name), [work, *self._platform_widgets(name)]]
        return [failed, *also]

    def draw(self) -> None:
        """Makes the dashboard, when all alarms are there."""
        state = cloudwatch.AlarmStatusWidget(alarms=list(self._alarms), title="Alarms", width=24)
        dashboard = cloudwatch.Dashboard(self._stack, "Dashboard", widgets=[[state], *self._rows])
        CfnOutput(self._stack, "DashboardName", value=dashboard.dashboard_name)

    def _realtime(self, name: str) -> list[cloudwatch.Alarm]:
        errors = cloudwatch.MathExpression(
            expression="100 * errors / calls",
            using_metrics={
                "errors": _platform(name, "Invocation5XXErrors", period=MINUTE),
                "calls": _platform(name, "Invocations", period=MINUTE),
            },
            label="Answers with 5xx, percent",
            period=MINUTE,
        )
        latency = _platform(name, "ModelLatency", "p95", period=MINUTE)
        return [
            self._alarm("realtime-5xx", errors, Limit(MAX_FAILED_PERCENT)),
            self._alarm("realtime-latency", latency, Limit(MAX_LATENCY_US)),
        ]

    def _asynchronous(self, name: str) -> list[cloudwatch.Alarm]:
        age = _of_endpoint(name, "ApproximateAgeOfOldestRequest", "max")
        self._alarm("asynchronous-age", age, Limit(MAX_JOB_AGE_S))
        waiting = _of_endpoint(name, "HasBacklogWithoutCapacity", "max", period=MINUTE)
        self._alarm("asynchronous-stuck", waiting, Limit(1, STUCK_MINUTES, STUCK_MINUTES))
        for metric in ("ExpiredRequests", "NotificationFailures", "RequestDownloadFailures", "ResponseUploadFailures"):
            self._alarm(f"asynchronous-{metric}", _platform(name, metric), AT_ALL)
        self._alarm("asynchronous-InvocationFailures", _platform(name, "InvocationFailures"), Limit(5))
        return []

    def _alarm(self, what: str, metric: cloudwatch.IMetric, limit: Limit) -> cloudwatch.Alarm:
        alarm = cloudwatch.Alarm(
            self._stack,
            f"{what}-alarm",
            metric=metric,
            threshold=limit.above,
            evaluation_periods=limit.periods,
            datapoints_to_alarm=limit.of_them,
            comparison_operator=cloudwatch.ComparisonOperator.GREATER_THAN_OR_EQUAL_TO_THRESHOLD,
            treat_missing_data=cloudwatch.TreatMissingData.NOT_BREACHING,
            alarm_description=f"{self._stack.stack_name}: {what}",
        )
        alarm.add_alarm_action(self._tell)
        alarm.add_ok_action(self._tell)
        self._alarms.append(alarm)
        return alarm

    def _own_row(self, name: str) -> list[cloudwatch.IWidget]:
        ends = [_own(name, REQUESTS, outcome, "sum") for outcome in OUTCOMES]
        typical = [_own(name, f"{stage}_ms", DONE, "p50") for stage in COUNTED_STAGES]
        slow = [_own(name, f"{stage}_ms", DONE, "p95") for stage in COUNTED_STAGES]
        return [
            _graph(f"{name}: requests by outcome", ends),
            _graph(f"{name}: milliseconds, median", typical),
            _graph(f"{name}: milliseconds, p95", slow),
        ]

    def _platform_widgets(self, name: str) -> list[cloudwatch.IWidget]:
        times = [_platform(name, "ModelLatency", statistic) for statistic in ("p50", "p95")]
        used = [_instances(name, f"{part}Utilization") for part in ("GPU", "GPUMemory", "CPU", "Memory", "Disk")]
        return [_graph(f"{name}: latency, microseconds", times), _graph(f"{name}: instances, percent", used)]


def _share(name: str, outcome: str) -> cloudwatch.MathExpression:
    """Percent of an endpoint's requests that end so, of those that were not refused."""
    counted = (DONE, FAILED, TURNED_AWAY)
    total = " + ".join(f"FILL({kind}, 0)" for kind in counted)
    return cloudwatch.MathExpression(
        expression=f"100 * FILL({outcome}, 0) / ({total})",
        using_metrics={kind: _own(name, REQUESTS, kind, "sum", period=MINUTE) for kind in counted},
        label=f"{outcome}, percent",
        period=MINUTE,
    )


def _own(name: str, metric: str, outcome: str, statistic: str, *, period: Duration = FIVE_MINUTES) -> cloudwatch.Metric:
    return cloudwatch.Metric(
        namespace=namespace_of(name),
        metric_name=metric,
        dimensions_map={OUTCOME: outcome},
        statistic=statistic,
        period=period,
        label=outcome if metric == REQUESTS else metric,
    )


def _platform(name: str, metric: str, statistic: str = "sum", *, period: Duration = FIVE_MINUTES) -> cloudwatch.Metric:
    return cloudwatch.Metric(
        namespace=PLATFORM,
        metric_name=metric,
        dimensions_map={"EndpointName": name, "VariantName": VARIANT},
        statistic=statistic,
        period=period,
    )


def _of_endpoint(
    name: str, metric: str, statistic: str = "avg", *, period: Duration = FIVE_MINUTES
) -> cloudwatch.Metric:
    return cloudwatch.Metric(
        namespace=PLATFORM,
        metric_name=metric,
        dimensions_map={"EndpointName": name},
        statistic=statistic,
        period=period,
    )


def _instances(name: str, metric: str) -> cloudwatch.Metric:
    return cloudwatch.Metric(
        namespace=INSTANCES,
        metric_name=metric,
        dimensions_map={"EndpointName": name, "VariantName": VARIANT},
        statistic="max",
        period=FIVE_MINUTES,
    )


def _graph(title: str, metrics: list[cloudwatch.Metric]) -> cloudwatch.GraphWidget:
    return cloudwatch.GraphWidget(title=title, left=list(metrics), width=8)
