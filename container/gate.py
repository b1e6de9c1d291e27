"""Who may ask, and how often: API keys and a rate for each, where the settings name them."""

from __future__ import annotations

import hmac
import math
import time
from collections.abc import Mapping

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from container.errors import Forbidden, Overloaded, Unauthorized
from container.settings import Settings

KEY_HEADER = "x-api-key"
BEARER = "bearer "


class TooOften(Overloaded):
    """The caller's own rate is used up."""

    public = "This caller asks too often."


class Gate:
    """Lets callers in by their keys, each so often as its rate allows. Without keys it counts by address.

    Args:
        settings: `api_keys` and `rate_limit`; a gate without either is open.
    """

    def __init__(self, settings: Settings) -> None:
        self._keys = [key.get_secret_value().encode() for key in settings.api_keys]
        self._rate: RateLimitItem | None = parse(settings.rate_limit) if settings.rate_limit else None
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def enter(self, headers: Mapping[str, str], address: str) -> None:
        """Returns where the caller may go on.

        Args:
            headers: by lower-case name.
            address: of the caller, or of the proxy before us.
        Raises:
            Unauthorized: no key came.
            Forbidden: it is none of ours.
            TooOften: the caller's rate is used up; says when to come back.
        """
        caller = f"key {self._place_of(_key_in(headers))}" if self._keys else f"address {address}"
        if self._rate is not None and not self._limiter.hit(self._rate, caller):
            free = self._limiter.get_window_stats(self._rate, caller).reset_time
            raise TooOften(retry_after_s=max(1, math.ceil(free - time.time())))

    def _place_of(self, key: str) -> int:
        if not key:
            raise Unauthorized("no key")
        places = [place for place, ours in enumerate(self._keys) if hmac.compare_digest(ours, key.encode())]
        if not places:
            raise Forbidden("unknown key")
        return places[0]


def _key_in(headers: Mapping[str, str]) -> str:
    authorization = headers.get("authorization", "")
    if authorization.lower().startswith(BEARER):
        return authorization[len(BEARER) :].strip()
    return headers.get(KEY_HEADER, "")
