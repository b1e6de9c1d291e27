"""The CDK app: reads the context, checks the plan, makes a stack of each name, and has cdk-nag look at all of them.

`python -m deploy.app` writes the templates to `cdk.out` and prints where; `cdk deploy` in this folder runs the same.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from aws_cdk import App, Aspects
from cdk_nag import AwsSolutionsChecks

from container.errors import InvalidJson
from container.strict_json import loads
from deploy.cdk_context import Plan, PlanError
from deploy.cdk_stack import REPOSITORY, VtonStack

CDK_JSON = Path(__file__).with_name("cdk.json")
OUT = REPOSITORY / "cdk.out"
OF_THE_COMMAND_LINE = "CDK_CONTEXT_JSON"  # which the CDK reads by itself


def make_app(context: dict[str, object], folder: str) -> App:
    """The app with its stacks, not yet written.

    Args:
        context: over which the CDK command line's own goes.
        folder: where templates are written to.
    Raises:
        PlanError: a context value is unknown or out of range.
    """
    app = App(context=context, outdir=folder, analytics_reporting=False)
    plan = Plan.from_context(app.node.get_all_context())
    for name in plan.stacks:
        VtonStack(app, name, plan=plan)
    Aspects.of(app).add(AwsSolutionsChecks())
    return app


def main() -> int:
    """Writes the templates; the exit status, 2 where a context value is refused."""
    try:
        _object(OF_THE_COMMAND_LINE, os.fsencode(os.environ.get(OF_THE_COMMAND_LINE, "")) or b"{}")
        context = _object(CDK_JSON.name, CDK_JSON.read_bytes())["context"]
        assembly = make_app(context, os.environ.get("CDK_OUTDIR", str(OUT))).synth()
    except PlanError as exc:
        sys.stderr.write(f"deployment refused: {exc}\n")
        return 2
    for stack in assembly.stacks:
        sys.stdout.write(f"{stack.template_full_path}\n")
    return 0


def _object(name: str, text: bytes) -> dict[str, Any]:
    try:
        found = loads(text)
    except InvalidJson as exc:
        raise PlanError(f"{name} is not JSON, or has a name twice") from exc
    if not isinstance(found, dict):
        raise PlanError(f"{name} must be a JSON object")
    return found


if __name__ == "__main__":
    sys.exit(main())
