"""Bytes of an image from a URL that a stranger wrote.

The name is resolved once, every answer is checked, and exactly a checked address is dialled (`_Backend.connect_tcp` is
the only place that opens a socket). Each read and write gets what is left of one total time, so that a far side that
drips a byte at a time gains nothing. No proxies, cookies, credentials or content encodings. Refusals look alike to the
caller; details go to the log.
"""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Protocol
from urllib.parse import urljoin

import httpcore
from botocore.exceptions import BotoCoreError, ClientError, ConnectTimeoutError, ReadTimeoutError

from container.addresses import is_public
from container.errors import (
    AddressNotPermitted,
    ImageNotFound,
    ImageSourceFailed,
    ImageSourceTimeout,
    ImageTooLarge,
    TooManyRedirects,
    UrlNotPermitted,
)
from container.request import MAX_URL_CHARACTERS

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MAX_BYTES = 15 * 1024 * 1024
TOTAL_S = 10.0
MAX_REDIRECTS = 3
MAX_KEY_BYTES = 1024  # of S3
HTTPS_PORT = 443
HTTP_PORT = 80
REDIRECTS = (301, 302, 303, 307, 308)
CHUNK_BYTES = 64 * 1024
HEADERS = [("Accept", "image/jpeg,image/png,image/webp"), ("Accept-Encoding", "identity"), ("User-Agent", "vton/1")]

URL = re.compile(
    r"(?P<scheme>https?)://"
    r"(?P<host>[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<target>(?:/[A-Za-z0-9._~!$&'()*+,;=:@%/-]*)?(?:\?[A-Za-z0-9._~!$&'()*+,;=:@%/?-]*)?)"
)
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# A key as S3 has it, and not as it stands in a URL: what would be read in two ways is refused.
S3_URI = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(?P<key>[^%?#\\]{1,1024})")

Resolve = Callable[[str, int], Iterable[str]]


class Fetcher(Protocol):
    """Where the bytes of an image come from."""

    def fetch(self, ref: str, *, user_id: str, deadline: float) -> bytes:
        """The bytes behind a reference of this user's; returns or raises before `deadline` (time.monotonic())."""


@dataclass(frozen=True)
class Target:
    """A URL that passed the grammar and the lists of hosts."""

    scheme: str
    host: str
    port: int
    path: str
    trusted: bool

    @property
    def url(self) -> str:
        """The URL as it will be requested; a default port stays out, for a presigned URL has signed the Host header."""
        default = HTTPS_PORT if self.scheme == "https" else HTTP_PORT
        port = "" if self.port == default else f":{self.port}"
        return f"{self.scheme}://{self.host}{port}{self.path}"


@dataclass(frozen=True)
class HostPolicy:
    """Which hosts images may come from.

    Attributes:
        image_hosts: if any, the only public hosts ("shop.example", "*.shop.example", "shop.example:8443").
        trusted_hosts: "host:port" that may be private and plain http.
    """

    image_hosts: tuple[str, ...] = ()
    trusted_hosts: tuple[str, ...] = ()

    def parse(self, url: str) -> Target:
        """The one reading of a URL.

        Raises:
            UrlNotPermitted: the URL is outside the grammar, or its host or port is not on the lists.
        """
        match = URL.fullmatch(url) if len(url) <= MAX_URL_CHARACTERS else None
        if match is None:
            raise UrlNotPermitted("outside the URL grammar")
        scheme, host = match["scheme"], match["host"].lower()
        port = int(match["port"]) if match["port"] else HTTPS_PORT if scheme == "https" else HTTP_PORT
        path = match["target"] if match["target"].startswith("/") else "/" + match["target"]
        if f"{host}:{port}" in self.trusted_hosts:
            return Target(scheme, host, port, path, trusted=True)
        if scheme != "https" or not _is_public_name(host) or not self._permits(host, port):
            raise UrlNotPermitted("scheme, host or port is not permitted")
        return Target(scheme, host, port, path, trusted=False)

    def _permits(self, host: str, port: int) -> bool:
        if not self.image_hosts:
            return port == HTTPS_PORT
        for entry in self.image_hosts:
            name, _, entry_port = entry.partition(":")
            if port == int(entry_port or HTTPS_PORT) and (
                host == name or (name.startswith("*.") and host.endswith(name[1:]))
            ):
                return True
        return False


class HttpsFetcher:
    """Images from public HTTPS hosts.

    Args:
        policy: which hosts.
        resolver_pool: runs name look-ups, which have no time limit of their own.
        resolve: every address of a name.
    """

    def __init__(self, policy: HostPolicy, resolver_pool: Executor, resolve: Resolve | None = None) -> None:
        self._policy = policy
        self._resolver_pool = resolver_pool
        self._resolve = resolve or addresses_of
        self._tls = ssl.create_default_context()
        self._tls.minimum_version = ssl.TLSVersion.TLSv1_2

    def fetch(self, ref: str, *, user_id: str, deadline: float) -> bytes:
        """The bytes behind an http(s) URL, at most `MAX_BYTES` of them, within `TOTAL_S` and before `deadline`.

        Raises:
            UrlNotPermitted, AddressNotPermitted, TooManyRedirects, ImageTooLarge, ImageNotFound: refused.
            ImageSourceFailed, ImageSourceTimeout: the host failed; a repeat may succeed.
        """
        del user_id  # a public host belongs to nobody
        deadline = min(deadline, time.monotonic() + TOTAL_S)
        target = self._policy.parse(ref)
        for _ in range(MAX_REDIRECTS + 1):
            body_or_location = self._get(target, deadline)
            if isinstance(body_or_location, bytes):
                return body_or_location
            target = self._policy.parse(_joined(target.url, body_or_location.url))
        raise TooManyRedirects(f"more than {MAX_REDIRECTS} redirects")

    def _get(self, target: Target, deadline: float) -> bytes | _Location:
        backend = _Backend(self._addresses, target.trusted, deadline)
        # In parts: out of a string, httpcore would read the URL again and lose ";..." and an empty query.
        url = httpcore.URL(scheme=target.scheme, host=target.host, port=target.port, target=target.path)
        try:
            with (
                httpcore.ConnectionPool(
                    ssl_context=self._tls, network_backend=backend, max_keepalive_connections=0, retries=0
                ) as pool,
                pool.stream("GET", url, headers=HEADERS) as response,
            ):
                headers = {name.lower(): value for name, value in response.headers}
                if response.status in REDIRECTS and b"location" in headers:
                    return _Location(headers[b"location"].decode("latin-1"))
                _refuse_status(response.status)
                return _read(response, headers)
        except httpcore.TimeoutException as exc:
            raise ImageSourceTimeout(f"{target.host}: {type(exc).__name__}") from exc
        except (httpcore.NetworkError, httpcore.ProtocolError, ssl.SSLError, OSError) as exc:
            raise ImageSourceFailed(f"{target.host}: {type(exc).__name__}: {exc}") from exc

    def _addresses(self, host: str, port: int, deadline: float) -> list[str]:
        future = self._resolver_pool.submit(lambda: list(self._resolve(host, port)))
        try:
            return future.result(timeout=max(0.0, deadline - time.monotonic()))
        except FutureTimeout as exc:
            future.cancel()
            raise httpcore.ConnectTimeout("name look-up") from exc
        except (OSError, UnicodeError) as exc:
            raise httpcore.ConnectError("name look-up") from exc


class S3Fetcher:
    """Images from our own bucket, under the caller's own prefix.

    Args:
        client: a boto3 S3 client.
        bucket: the only bucket.
        key_prefix: what every key begins with.
    """

    def __init__(self, client: S3Client, bucket: str, key_prefix: str) -> None:
        self._client = client
        self._bucket = bucket
        self._key_prefix = key_prefix

    def fetch(self, ref: str, *, user_id: str, deadline: float) -> bytes:
        """The bytes of an object `s3://bucket/users/{user_id}/...`.

        Raises:
            UrlNotPermitted, ImageTooLarge, ImageNotFound, ImageSourceFailed, ImageSourceTimeout.
        """
        match = S3_URI.fullmatch(ref)
        own = f"{self._key_prefix}users/{user_id}/"
        if match is None or match["bucket"] != self._bucket or not match["key"].startswith(own):
            raise UrlNotPermitted("not an object of this caller's")
        if any(part in ("", ".", "..") for part in match["key"].split("/")) or not match["key"].isprintable():
            raise UrlNotPermitted("not a plain key")
        if len(match["key"].encode()) > MAX_KEY_BYTES:
            raise UrlNotPermitted("longer than S3's keys are")
        if time.monotonic() >= deadline:
            raise ImageSourceTimeout("no time was left")
        return self._read(match["key"])

    def _read(self, key: str) -> bytes:
        try:
            found = self._client.get_object(Bucket=self._bucket, Key=key)
            if found["ContentLength"] > MAX_BYTES:
                raise ImageTooLarge("announced")
            data: bytes = found["Body"].read()
        except ClientError as exc:
            status = exc.response["ResponseMetadata"]["HTTPStatusCode"]
            raise (ImageNotFound if status in (403, 404) else ImageSourceFailed)(f"S3 answered {status}") from exc
        except (ConnectTimeoutError, ReadTimeoutError) as exc:
            raise ImageSourceTimeout(type(exc).__name__) from exc
        except (BotoCoreError, OSError) as exc:
            raise ImageSourceFailed(type(exc).__name__) from exc
        return data


class ByScheme:
    """`s3://` to one fetcher, everything else to another, which also refuses what is no URL.

    Args:
        https: for http(s) URLs.
        s3: for `s3://` references; None where results are not kept in S3.
    """

    def __init__(self, https: Fetcher, s3: Fetcher | None) -> None:
        self._https = https
        self._s3 = s3

    def fetch(self, ref: str, *, user_id: str, deadline: float) -> bytes:
        """The bytes behind the reference; raises what the fetcher of its scheme raises."""
        fetcher = self._s3 if self._s3 is not None and ref.startswith("s3://") else self._https
        return fetcher.fetch(ref, user_id=user_id, deadline=deadline)


def addresses_of(host: str, port: int) -> list[str]:
    """Every address of a name, as the system's resolver gives them."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


@dataclass(frozen=True)
class _Location:
    url: str


class _Backend(httpcore.SyncBackend):
    """Dials checked addresses only, and gives every operation what is left of the total time."""

    def __init__(self, addresses: Callable[[str, int, float], list[str]], trusted: bool, deadline: float) -> None:
        self._addresses = addresses
        self._trusted = trusted
        self._deadline = deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """A connection to the first address of the name, if all its addresses are permitted."""
        addresses = self._addresses(host, port, self._deadline)
        if not self._trusted and not (addresses and all(is_public(address) for address in addresses)):
            raise AddressNotPermitted("the name has an address that is not public")
        stream = super().connect_tcp(addresses[0], port, _left(self._deadline), local_address, socket_options)
        return _Stream(stream, self._deadline)


class _Stream(httpcore.NetworkStream):
    """A stream whose every operation ends at one deadline."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(self._deadline))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, _left(self._deadline))
        return _Stream(stream, self._deadline)

    def get_extra_info(self, info: str) -> Any:  # noqa: ANN401 - httpcore's signature
        return self._stream.get_extra_info(info)


def _joined(base: str, location: str) -> str:
    try:
        return urljoin(base, location)
    except ValueError as exc:  # "https://["
        raise UrlNotPermitted("redirected to what is no URL") from exc


def _left(deadline: float) -> float:
    """Seconds left, never zero: a socket reads a timeout of 0 as "do not block"."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout("the total time is over")
    return left


def _is_public_name(host: str) -> bool:
    """True for a DNS name with at least two labels whose last is no number: all spellings of an address are out."""
    labels = host.split(".")
    return len(labels) >= 2 and all(LABEL.fullmatch(label) for label in labels) and not labels[-1][0].isdigit()


def _refuse_status(status: int) -> None:
    if status == 200:
        return
    if 400 <= status < 500 and status not in (408, 425, 429):
        raise ImageNotFound(f"the host answered {status}")
    raise ImageSourceFailed(f"the host answered {status}")


def _read(response: httpcore.Response, headers: Mapping[bytes, bytes]) -> bytes:
    announced = headers.get(b"content-length", b"0")
    if announced.isdigit() and int(announced[:20]) > MAX_BYTES:
        raise ImageTooLarge("announced")
    chunks, count = [], 0
    for chunk in response.iter_stream():
        count += len(chunk)
        if count > MAX_BYTES:
            raise ImageTooLarge("counted")
        chunks.append(chunk)
    return b"".join(chunks)
