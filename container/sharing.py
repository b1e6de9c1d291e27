"""What requests share: places, keys and a memory. Nothing here waits without an end."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Callable, Generic, TypeVar

from container.errors import DeadlineExceeded, Draining, Overloaded

_T = TypeVar("_T")


class Admission:
    """A bounded count of requests in flight. Never blocks."""

    def __init__(self, limit: int, retry_after_s: Callable[[int], int]) -> None:
        self._limit = limit
        self._retry_after_s = retry_after_s
        self._lock = threading.Lock()
        self._taken = 0
        self._draining = False

    @property
    def taken(self) -> int:
        """Requests in flight."""
        return self._taken

    @property
    def draining(self) -> bool:
        """True once no more requests are admitted."""
        return self._draining

    def drain(self) -> None:
        """Admits no more requests."""
        self._draining = True

    def enter(self) -> None:
        """Takes one place, which the caller gives back with `leave`.

        Raises:
            Draining: the process is shutting down.
            Overloaded: all places are taken; says when to come back.
        """
        with self._lock:
            if self._draining:
                raise Draining(retry_after_s=1)
            if self._taken >= self._limit:
                raise Overloaded(retry_after_s=self._retry_after_s(self._taken))
            self._taken += 1

    def leave(self) -> None:
        """Gives one place back."""
        with self._lock:
            self._taken -= 1


class KeyLocks:
    """One holder per key: of two requests for the same object the second waits and then finds it stored."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._held: set[str] = set()

    @contextmanager
    def hold(self, key: str, deadline: float) -> Iterator[None]:
        """Holds the key inside the block.

        Raises:
            DeadlineExceeded: another request held it until `deadline` (time.monotonic()).
        """
        with self._condition:
            if not self._condition.wait_for(lambda: key not in self._held, timeout=deadline - time.monotonic()):
                raise DeadlineExceeded("another request for the same key was still running")
            self._held.add(key)
        try:
            yield
        finally:
            with self._condition:
                self._held.remove(key)
                self._condition.notify_all()


class Memory(Generic[_T]):
    """The latest things by key, at most `limit` of them.

    Args:
        limit: how many are kept; the longest unused one goes first.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, _T] = OrderedDict()

    def recall(self, key: str) -> _T | None:
        """What is kept under the key, which then counts as used."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key]

    def keep(self, key: str, thing: _T) -> None:
        """Keeps a thing under the key."""
        with self._lock:
            self._kept[key] = thing
            self._kept.move_to_end(key)
            while len(self._kept) > self._limit:
                self._kept.popitem(last=False)
