"""The CDK app: reads the context, checks the plan, makes a stack of each name, and has cdk-nag look at all of them.

`python -m deploy.app` writes the templates to `cdk.out` and prints where; `cdk deploy` in this folder runs the same.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from aws_cdk import App, Aspects
from cdk_nag import AwsSolutionsChecks

from deploy.cdk_context import Plan, PlanError
from deploy.cdk_stack import REPOSITORY, VtonStack

CDK_JSON = Path(__file__).with_name("cdk.json")
OUT = REPOSITORY / "cdk.out"


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
    context = json.loads(CDK_JSON.read_text())["context"]
    try:
        assembly = make_app(context, os.environ.get("CDK_OUTDIR", str(OUT))).synth()
    except PlanError as exc:
        sys.stderr.write(f"deployment refused: {exc}\n")
        return 2
    for stack in assembly.stacks:
        sys.stdout.write(f"{stack.template_full_path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
