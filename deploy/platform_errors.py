"""How SageMaker's runtime refuses a call, and what it says of a container that did.

Source: botocore's service model of sagemaker-runtime.
"""

from __future__ import annotations

import json

from starlette.responses import Response

ACCOUNT = "000000000000"
REGION = "local"
LOG_GROUP = "/aws/sagemaker/Endpoints/{name}"
NO_STATUS = 0  # of a container that gave no answer
CLIENT_ERRORS = range(400, 500)


class PlatformError(Exception):
    """One refusal, as the client's exception class and its members.

    Args:
        status: of HTTP.
        kind: name of the client's exception; None is an error that has the status for a name.
        message: for people.
        members: further members of the error.
    """

    def __init__(self, status: int, kind: str | None, message: str, **members: object) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.members = {"Message": message, "message": message, **members}

    def response(self) -> Response:
        """What the client gets."""
        headers = {} if self.kind is None else {"x-amzn-errortype": self.kind}
        return Response(
            json.dumps(self.members), status_code=self.status, media_type="application/json", headers=headers
        )


def validation_error(message: str) -> PlatformError:
    """The call itself is wrong."""
    return PlatformError(400, "ValidationError", message)


def content_too_long(max_bytes: int) -> PlatformError:
    """The body of the call is too large."""
    return PlatformError(413, None, f"HTTP content length exceeded {max_bytes} bytes.")


def model_error(name: str, status: int, original: str) -> PlatformError:
    """The container refused, or gave no answer.

    Args:
        name: of the endpoint.
        status: the container's, or `NO_STATUS`.
        original: the container's body, or what became of it.
    """
    return PlatformError(
        424,
        "ModelError",
        received(name, status, original),
        OriginalStatusCode=status,
        OriginalMessage=original,
        LogStreamArn=f"arn:aws:logs:{REGION}:{ACCOUNT}:log-group:{LOG_GROUP.format(name=name)}",
    )


def received(name: str, status: int, original: str) -> str:
    """The platform's sentence about a container's refusal."""
    where = f"https://{REGION}.console.aws.amazon.com/cloudwatch/home?region={REGION}#logEventViewer:group="
    return (
        f'Received {_side(status)} error ({status}) from primary with message "{original}". '
        f"See {where}{LOG_GROUP.format(name=name)} in account {ACCOUNT} for more information."
    )


def of_model(status: int) -> str:
    """The platform's sentence about a failed asynchronous invocation."""
    return (
        f"Received {_side(status)} error ({status}) from model. "
        "See the SageMaker Endpoint logs in your account for more information."
    )


def _side(status: int) -> str:
    return "client" if status in CLIENT_ERRORS else "server"
