"""Every way in which a request can end other than well.

TryOnError
├── Refusal (the caller's fault; the same request fails again)
│   ├── InvalidJson 400, RequestTooLarge 413, UnsupportedContentType 415, RequestTimeout 408
│   ├── Unauthorized 401, Forbidden 403, NotFound 404, MethodNotAllowed 405
│   ├── JobConflict 409
│   ├── InvalidRequest 422 (field)
│   ├── UrlNotPermitted, AddressNotPermitted, TooManyRedirects 422
│   ├── ImageTooLarge, ImageNotFound, ImageNotDecodable, ImageFormatNotPermitted 422
│   ├── ImageTooSmall, ImageTooManyPixels, MaskInvalid, PersonNotFound 422
└── Outage (ours or a neighbour's; a repeat may succeed)
    ├── Overloaded 429, NotReady 503, Draining 503, GpuFailed 503
    ├── ImageSourceFailed 502, ImageSourceTimeout 504, DeadlineExceeded 504
    ├── StorageFailed 502, NotifyFailed 502
    └── Internal 500, GenerationFailed 500

`public` is all that a caller ever reads; `str(error)` is for the log and never carries a query string.
"""

from __future__ import annotations

from typing import ClassVar


class TryOnError(Exception):
    """One failure, with what the caller is told.

    Args:
        detail: for the log only.
        field: the field of the request that is at fault.
        retry_after_s: how long a repeat should wait, seconds.
        retryable: overrides the class's answer to "may a repeat succeed?".
        object_key: where the finished picture lies already, if only a later effect failed.
    """

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    public: ClassVar[str] = "The request failed on our side."
    retryable: bool = True

    def __init__(
        self,
        detail: str = "",
        *,
        field: str | None = None,
        retry_after_s: int | None = None,
        retryable: bool | None = None,
        object_key: str | None = None,
    ) -> None:
        super().__init__(detail or self.public)
        self.field = field
        self.retry_after_s = retry_after_s
        self.object_key = object_key
        if retryable is not None:
            self.retryable = retryable

    def body(self, request_id: str) -> dict[str, dict[str, object]]:
        """The JSON that the caller gets: a fixed sentence per code, and nothing of the input."""
        error: dict[str, object] = {
            "code": self.code,
            "message": self.public,
            "retryable": self.retryable,
            "request_id": request_id,
        }
        for name in ("retry_after_s", "field", "object_key"):
            if getattr(self, name) is not None:
                error[name] = getattr(self, name)
        return {"error": error}


class Refusal(TryOnError):
    """The caller's fault."""

    retryable = False


class Outage(TryOnError):
    """Not the caller's fault."""


class InvalidJson(Refusal):
    code, status, public = "invalid_json", 400, "The body is not valid JSON."


class Unauthorized(Refusal):
    code, status, public = "unauthorized", 401, "A valid API key is needed."


class Forbidden(Refusal):
    code, status, public = "forbidden", 403, "This key may not do that."


class NotFound(Refusal):
    code, status, public = "not_found", 404, "There is nothing at this path."


class MethodNotAllowed(Refusal):
    code, status, public = "method_not_allowed", 405, "This path does not take that method."


class RequestTimeout(Refusal):
    code, status, public = "request_timeout", 408, "The body did not arrive in time."
    retryable = True


class JobConflict(Refusal):
    code, status, public = "job_conflict", 409, "This userId and timestamp already belong to a job with other inputs."


class RequestTooLarge(Refusal):
    code, status, public = "request_too_large", 413, "The body is too large."


class UnsupportedContentType(Refusal):
    code, status, public = "unsupported_content_type", 415, "The body must be application/json."


class InvalidRequest(Refusal):
    code, status, public = "invalid_request", 422, "A field of the request is missing, unknown or out of range."


class UrlNotPermitted(Refusal):
    code, status, public = "url_not_permitted", 422, "The image URL is not permitted."


class AddressNotPermitted(Refusal):
    code, status, public = "address_not_permitted", 422, "The image host is not permitted."


class TooManyRedirects(Refusal):
    code, status, public = "too_many_redirects", 422, "The image URL redirects too often."


class ImageTooLarge(Refusal):
    code, status, public = "image_too_large", 422, "The image file is too large."


class ImageNotFound(Refusal):
    code, status, public = "image_not_found", 422, "There is no image at the URL, or access to it was refused."


class ImageNotDecodable(Refusal):
    code, status, public = "image_not_decodable", 422, "The image file is damaged or is not an image."


class ImageFormatNotPermitted(Refusal):
    code, status, public = "image_format_not_permitted", 422, "The image must be a still JPEG, PNG or WebP."


class ImageTooSmall(Refusal):
    code, status, public = "image_too_small", 422, "The image is too small, or too long for its width."


class ImageTooManyPixels(Refusal):
    code, status, public = "image_too_many_pixels", 422, "The image has too many pixels."


class MaskInvalid(Refusal):
    code, status, public = "mask_invalid", 422, "The mask leaves nothing to replace, or nothing to keep."


class PersonNotFound(Refusal):
    code, status, public = "person_not_found", 422, "No person was found in the photo."


class Overloaded(Outage):
    code, status, public = "overloaded", 429, "All places are taken."


class Internal(Outage):
    """Whatever no one foresaw."""


class GenerationFailed(Outage):
    code, status, public = "generation_failed", 500, "The model made no usable picture."


class ImageSourceFailed(Outage):
    code, status, public = "image_source_failed", 502, "The image host failed."


class StorageFailed(Outage):
    code, status, public = "storage_failed", 502, "The result could not be stored."


class NotifyFailed(Outage):
    code, status, public = "notify_failed", 502, "The picture is stored, but its message could not be sent."


class NotReady(Outage):
    code, status, public = "not_ready", 503, "The model is still loading."


class Draining(Outage):
    code, status, public = "draining", 503, "This instance is shutting down."


class GpuFailed(Outage):
    code, status, public = "gpu_failed", 503, "The processor that makes the pictures failed."


class ImageSourceTimeout(Outage):
    code, status, public = "image_source_timeout", 504, "The image host was too slow."


class DeadlineExceeded(Outage):
    code, status, public = "deadline_exceeded", 504, "The picture could not be made in time."
