"""The context value `settings`: variables of the container, as far as they work on SageMaker."""

from __future__ import annotations

import re
from collections.abc import Mapping

from container.errors import InvalidJson
from container.settings import PREFIX, Settings, SettingsError
from container.strict_json import loads

SET_BY_THE_STACK = {
    f"{PREFIX}{name}"
    for name in (
        "WEIGHTS",
        "BUCKET",
        "KEY_PREFIX",
        "QUEUE_URL",
        "MASK_QUEUE_URL",
        "DEADLINE_S",
        "MAX_IN_FLIGHT",
        "METRICS_NAMESPACE",
        "OUTPUT_DIR",
        "PORT",
    )
}
UNFIT = {  # variable -> why it cannot be had on SageMaker
    f"{PREFIX}API_KEYS": "cannot be had: the platform hands on no header that could carry a key; IAM says who may call",
    f"{PREFIX}COMPILE": "cannot be had: the image has no compiler; an `image` of the target compiled sets it itself",
    f"{PREFIX}HOST": "cannot be had: the platform calls from outside, and the container listens on all addresses",
}
SECRETS = (f"{PREFIX}LOG_SALT",)
REFERENCE = re.compile(r"\{\{resolve:secretsmanager:[^{}]+\}\}")
MAX_VARIABLE_CHARACTERS = 1024  # SageMaker's, for the name and the value of each variable
VARIANTS = {"catvton": ("mix", "vitonhd", "dresscode")}  # by engine; to ask the engines themselves would load torch


def as_variables(settings: object) -> dict[str, str]:
    """The variables in a JSON object, which may be written as text, each value as the container will read it.

    Raises:
        ValueError: it is none, or has a value that is neither text, number nor truth value.
    """
    if isinstance(settings, str):
        try:
            settings = loads(settings.encode())
        except InvalidJson as exc:
            raise ValueError("must be a JSON object of VTON_ variables") from exc
    if not isinstance(settings, dict):
        raise ValueError("must be a JSON object of VTON_ variables")  # noqa: TRY004 - pydantic reports ValueError only
    if not all(isinstance(value, (str, int, float)) for value in settings.values()):
        raise ValueError("must have texts, numbers or truth values; a list is text with commas")
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in settings.items()}


def refuse_unfit(variables: Mapping[str, str]) -> None:
    """Lets those pass that a deployment may choose.

    Raises:
        ValueError: one is not the container's, the stack's own, of no use on SageMaker, too long, or a secret in plain.
    """
    for name, value in variables.items():
        if not name.startswith(PREFIX):
            raise ValueError(f"{name} is no VTON_ variable")
        if name in SET_BY_THE_STACK:
            raise ValueError(f"{name} is set by the stack")
        if name in UNFIT:
            raise ValueError(f"{name} {UNFIT[name]}")
        if name in SECRETS and not REFERENCE.fullmatch(value):
            raise ValueError(f"{name} is a secret: give it as {{{{resolve:secretsmanager:...}}}}")
        if len(value) > MAX_VARIABLE_CHARACTERS:
            raise ValueError(f"{name} is longer than the {MAX_VARIABLE_CHARACTERS} characters that SageMaker takes")


def require_a_start(variables: Mapping[str, str]) -> None:
    """Lets those pass with which a container starts.

    Raises:
        ValueError: it would refuse them, or has no such engine or variant.
    """
    try:
        settings = Settings.from_env(variables)
    except SettingsError as exc:
        raise ValueError(f"settings: the container would refuse {exc}") from exc
    if settings.engine not in VARIANTS:
        raise ValueError(f"settings: {PREFIX}ENGINE must be one of {', '.join(VARIANTS)}")
    if settings.variant not in VARIANTS[settings.engine]:
        raise ValueError(f"settings: {PREFIX}VARIANT must be one of {', '.join(VARIANTS[settings.engine])}")
