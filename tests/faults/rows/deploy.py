"""deploy: what the template of the deployment promises."""

from __future__ import annotations

from ..registry import not_applicable

for number in range(1, 6):
    not_applicable(f"D0{number}", "there is no CDK stack yet; it comes with the deployment")
