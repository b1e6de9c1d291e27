from __future__ import annotations

import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone

import boto3
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, ReadTimeoutError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from moto.server import ThreadedMotoServer

from container import fetch
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
from container.fetch import MAX_BYTES, ByScheme, HostPolicy, HttpsFetcher, S3Fetcher, addresses_of

PUBLIC = "52.216.10.1"  # stands for the loopback server; `dialled` sees to it that nobody calls it
HOST = "images.example"
TLS_HELLO = b"\x16\x03"
METADATA = "http://169.254.169.254/latest/meta-data/"


# --- a host on loopback that answers as a test says


class ImageHost:
    """One TCP port that gives every connection to `answer(connection, request)`, by TLS if there is a context."""

    def __init__(self, answer, tls=None):
        self.answer, self.tls, self.requests, self.connections = answer, tls, [], 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection):
        connection.settimeout(5)
        try:
            with self.tls.wrap_socket(connection, server_side=True) if self.tls else connection as stream:
                request = b""
                while b"\r\n\r\n" not in request and not request.startswith(TLS_HELLO):
                    received = stream.recv(65536)
                    if not received:
                        return
                    request += received
                self.requests.append(request)
                self.answer(stream, request)
        except OSError:  # the fetcher hung up, or refused our certificate
            pass
        finally:
            connection.close()

    def close(self):
        self._socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        self._socket.close()


def says(status, body=b"", **headers):
    """An answer with these headers (`content_length=None` leaves that one out) and this body."""
    fields = {"content_length": len(body), **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items() if value is not None)
    whole = f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + body

    return lambda stream, request: stream.sendall(whole)


def redirects_to(*locations, status=302):
    """Answers request number n with a redirect to location number n, and what follows with a picture."""
    left = list(locations)

    def answer(stream, request):
        (says(status, location=left.pop(0)) if left else says(200, b"picture"))(stream, request)

    return answer


def drips(head, piece, every_s=0.02):
    """Sends `head`, then `piece` again and again."""

    def answer(stream, request):
        stream.sendall(head)
        while True:
            stream.sendall(piece)
            time.sleep(every_s)

    return answer


# --- certificates


def certificate(name, *, issuer=None, days=1):
    """A key and a certificate for a DNS name; without an issuer it signs itself, with days < 0 it has expired."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    issuer_key, issuer_name = (issuer[0], issuer[1].subject) if issuer else (key, subject)
    now = datetime.now(timezone.utc)
    signed = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=3))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=issuer is None,
                crl_sign=issuer is None,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .sign(issuer_key, hashes.SHA256())
    )
    return key, signed


def server_context(directory, key, signed):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    file = directory / f"{signed.serial_number}.pem"
    file.write_bytes(
        signed.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context.load_cert_chain(file)
    return context


@pytest.fixture(scope="session")
def authority():
    return certificate("Test authority")


@pytest.fixture(scope="session")
def trusted_tls(authority, tmp_path_factory):
    """What an honest host for HOST presents."""
    return server_context(tmp_path_factory.mktemp("tls"), *certificate(HOST, issuer=authority))


@pytest.fixture
def trust(authority, tmp_path, monkeypatch):
    """The test authority in the place of the system's."""
    file = tmp_path / "authority.pem"
    file.write_bytes(authority[1].public_bytes(serialization.Encoding.PEM))
    monkeypatch.setenv("SSL_CERT_FILE", str(file))


# --- the fetcher under test


class Dialled(list):
    """Every (address, port) that was dialled; `to` says which loopback port stands behind a public address."""

    def __init__(self):
        super().__init__()
        self.to = {}


@pytest.fixture
def dialled(monkeypatch):
    real, record = socket.create_connection, Dialled()

    def connect(address, *args, **kwargs):
        record.append(address)
        if address[1] in record.to and is_public(address[0]):
            address = ("127.0.0.1", record.to[address[1]])
        assert address[0] == "127.0.0.1"
        return real(address, *args, **kwargs)

    monkeypatch.setattr(socket, "create_connection", connect)
    return record


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture
def canary():
    with serving(says(200, b"secret")) as host:
        yield host


@contextmanager
def serving(answer, tls=None):
    host = ImageHost(answer, tls)
    try:
        yield host
    finally:
        host.close()


@pytest.fixture
def public(trust, trusted_tls, dialled, pool):
    """public(answer, url): what a fetch of the URL from a public host that answers so gives; `.host` is the host."""

    def get(answer, url=f"https://{HOST}/person.jpg", policy=None, seconds=5):
        with serving(answer, trusted_tls) as host:
            get.host, dialled.to[443], dialled.to[8443] = host, host.port, host.port
            fetcher = HttpsFetcher(policy or HostPolicy(), pool, lambda name, port: [PUBLIC])
            return fetcher.fetch(url, user_id="u", deadline=time.monotonic() + seconds)

    return get


@pytest.fixture
def local(pool):
    """local(answer): what a fetch from a trusted http host on loopback gives; faster than TLS where that is no part."""

    def get(answer, path="/person.jpg", seconds=5):
        with serving(answer) as host:
            get.host = host
            fetcher = HttpsFetcher(HostPolicy(trusted_hosts=(f"127.0.0.1:{host.port}",)), pool)
            url = f"http://127.0.0.1:{host.port}{path}"
            return fetcher.fetch(url, user_id="u", deadline=time.monotonic() + seconds)

    return get


def refuse(url, pool, *addresses, policy=None):
    """What a fetch raises when the name has these addresses."""
    fetcher = HttpsFetcher(policy or HostPolicy(), pool, lambda name, port: list(addresses))
    return fetcher.fetch(url, user_id="u", deadline=time.monotonic() + 5)


# --- URLs

REFUSED_URLS = {
    "S01": [METADATA, "https://169.254.169.254/latest/meta-data/", "http://169.254.170.2/v2/credentials"],
    "S02": ["https://127.0.0.1/", "https://localhost/", "https://0.0.0.0/", "https://[::1]/", "https://[::]/"],
    "S03": ["https://10.0.0.5/", "https://172.16.0.1/", "https://192.168.1.1/", "https://8.8.8.8/"],
    "S05": [
        "file:///etc/passwd",
        "ftp://images.example/a.jpg",
        "gopher://images.example/_x",
        "data:image/png;base64,AAAA",
        "jar:https://images.example/a!/b",
        "dict://images.example/d",
        "ldap://images.example/o",
        "//images.example/a.jpg",
        "/etc/passwd",
        "images.example/a.jpg",
        "http://images.example/a.jpg",
        "HTTPS://images.example/a.jpg",
        "https:images.example/a.jpg",
        "https:///a.jpg",
        "https://",
        "",
    ],
    "S07": [
        "https://2130706433/",
        "https://0x7f000001/",
        "https://0177.0.0.1/",
        "https://127.1/",
        "https://0/",
        "https://169.254.43518/",
        "https://0251.0376.0251.0376/",
        "https://127.0.0.0x1/",
        "https://images.0x7f/",
    ],
    "S08": [
        "https://allowed.example@evil.test/",
        "https://u:p@allowed.example/",
        "https://@images.example/",
        "https://images.example\\@evil.test/",
        "https://images.example#@evil.test/",
    ],
    "S19": [
        *(f"https://images.example:{port}/" for port in (22, 25, 6379, 2375, 8080, 0, 80, 8443, 65536, 99999)),
        "https://images.example:0x50/",
        "https://images.example:/",
        "https://images.example:-1/",
        "https://images.example:443:443/",
        "https://images.example:\u0664\u0664\u0663/",
    ],
    "grammar": [
        " https://images.example/",
        "https://images.example/\n",
        "https://images.example/a b",
        "https://images.example/\r\nHost: evil",
        "https://images.example/a\tb",
        "https://images.example/\x00",
        "https://images.example/\u00e9",
        "https://\uff49mages.example/",
        "https://\u2460.example/",
        "https://images.example./",
        "https://.images.example/",
        "https://images..example/",
        "https://-images.example/",
        "https://images-.example/",
        "https://images_1.example/",
        "https://images%2eexample/",
        f"https://{'a' * 64}.example/",
        f"https://{'a.' * 127}example/",
        "https://images.example/a#b",
        "https://images.example?a=\\",
        "https://images.example/" + "a" * 2026,
    ],
}


def test_the_corpus_has_urls_of_every_row_that_the_grammar_answers():
    assert {"S01", "S02", "S03", "S05", "S07", "S08", "S19"} <= REFUSED_URLS.keys()


@pytest.mark.parametrize("url", [url for row in REFUSED_URLS.values() for url in row], ids=lambda url: repr(url)[:60])
def test_a_url_outside_the_grammar_is_refused_before_a_name_is_looked_up(url, dialled, pool):
    def resolve(name, port):
        raise AssertionError(name)

    with pytest.raises(UrlNotPermitted):
        HttpsFetcher(HostPolicy(), pool, resolve).fetch(url, user_id="u", deadline=time.monotonic() + 5)
    assert dialled == []


@pytest.mark.parametrize(
    ("url", "requested"),
    [
        ("https://Images.Example/A.jpg", "https://images.example/A.jpg"),
        ("https://images.example", "https://images.example/"),
        ("https://images.example?a=1", "https://images.example/?a=1"),
        ("https://images.example:443/a", "https://images.example/a"),
        ("https://images.example:0443/a", "https://images.example/a"),
        ("https://xn--bcher-kva.example/a", "https://xn--bcher-kva.example/a"),
        ("https://3m.example/a", "https://3m.example/a"),
    ],
)
def test_a_url_has_one_reading(url, requested):
    assert HostPolicy().parse(url).url == requested


def test_the_longest_url_is_permitted():
    url = "https://images.example/" + "a" * 2025
    assert (len(url), HostPolicy().parse(url).url) == (2048, url)


# --- addresses

NOT_PUBLIC = ["127.0.0.1", "10.0.0.5", "169.254.169.254", "::1", "::ffff:127.0.0.1", "fe80::1%eth0", "fd00:ec2::254"]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_a_name_with_an_address_that_is_not_public_is_refused_undialled(address, dialled, pool):
    with pytest.raises(AddressNotPermitted):
        refuse(f"https://{HOST}/", pool, address)
    assert dialled == []


@pytest.mark.parametrize("addresses", [(PUBLIC, "127.0.0.1"), ("127.0.0.1", PUBLIC), (PUBLIC, PUBLIC, "::1")])
def test_one_address_that_is_not_public_spoils_all(addresses, dialled, pool):
    with pytest.raises(AddressNotPermitted):
        refuse(f"https://{HOST}/", pool, *addresses)
    assert dialled == []


def test_a_name_without_an_address_is_refused(dialled, pool):
    with pytest.raises(AddressNotPermitted):
        refuse(f"https://{HOST}/", pool)
    assert dialled == []


@pytest.mark.parametrize(
    "host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0", "169.254.43518", "0251.0376.0251.0376"]
)
def test_a_spelling_of_an_address_that_got_past_the_grammar_is_refused_by_address(host):
    assert not any(is_public(address) for address in addresses_of(host, 443))


def test_the_checked_address_is_dialled_and_the_name_looked_up_once(trust, trusted_tls, dialled, pool):
    asked = []

    def flips(name, port):
        asked.append((name, port))
        return [PUBLIC] if len(asked) == 1 else ["127.0.0.1"]

    with serving(says(200, b"picture"), trusted_tls) as host:
        dialled.to[443] = host.port
        fetcher = HttpsFetcher(HostPolicy(), pool, flips)
        assert fetcher.fetch(f"https://{HOST}/", user_id="u", deadline=time.monotonic() + 5) == b"picture"
    assert (asked, dialled) == ([(HOST, 443)], [(PUBLIC, 443)])


def test_a_name_that_does_not_exist_is_a_failure_of_the_source(pool):
    def resolve(name, port):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.raises(ImageSourceFailed):
        HttpsFetcher(HostPolicy(), pool, resolve).fetch(f"https://{HOST}/", user_id="u", deadline=time.monotonic() + 5)


def test_a_look_up_that_hangs_ends_at_the_deadline(pool):
    hang = threading.Event()
    fetcher = HttpsFetcher(HostPolicy(), pool, lambda name, port: hang.wait(60) and [])
    began = time.monotonic()
    with pytest.raises(ImageSourceTimeout):
        fetcher.fetch(f"https://{HOST}/", user_id="u", deadline=began + 0.1)
    took = time.monotonic() - began
    hang.set()
    assert took < 30


# --- the request


def test_a_public_host_gives_its_bytes(public):
    assert public(says(200, b"picture")) == b"picture"


def test_the_query_is_sent_byte_for_byte(public):
    query = "X-Amz-Credential=AKIA%2F20241108%2Feu&X-Amz-Signature=0a%2fB&a=&b&c=1;d=~!$'()*,:@/?%20+"
    public(says(200, b"picture"), f"https://{HOST}/users/7/a%20b.jpg?{query}")
    assert public.host.requests[0].startswith(f"GET /users/7/a%20b.jpg?{query} HTTP/1.1\r\n".encode())


@pytest.mark.parametrize("target", ["/a.jpg;v=2", "/a;b/c.jpg;v=2?d", "/a.jpg?", "/a//b/../c", "/%2e%2e/%00", "/?"])
def test_the_path_is_sent_byte_for_byte(local, target):
    local(says(200, b"picture"), target)
    assert local.host.requests[0].startswith(f"GET {target} HTTP/1.1\r\n".encode())


def test_the_host_header_has_no_default_port(public):
    public(says(200, b"picture"), f"https://{HOST}:443/")
    assert f"\r\nHost: {HOST}\r\n".encode() in public.host.requests[0]


def test_the_host_header_has_a_port_that_is_not_the_default(public):
    public(says(200, b"picture"), f"https://{HOST}:8443/", HostPolicy(image_hosts=(f"{HOST}:8443",)))
    assert f"\r\nHost: {HOST}:8443\r\n".encode() in public.host.requests[0]


def test_nothing_but_the_four_headers_is_sent(public, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text(f"machine {HOST} login me password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    public(redirects_to("/second", "/third"))
    for request in public.host.requests:
        lines = request.decode().split("\r\n")[1:-2]
        assert [line.partition(":")[0] for line in lines] == ["Host", "Accept", "Accept-Encoding", "User-Agent"]


def test_a_cookie_is_not_kept(public):
    public(lambda stream, request: redirects_to("/second")(stream, request) if b"/person" in request else ok(stream))
    assert b"ookie" not in public.host.requests[-1]


def ok(stream):
    says(200, b"picture")(stream, b"")


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy"])
def test_a_proxy_in_the_environment_is_ignored(local, canary, monkeypatch, name):
    monkeypatch.setenv(name, f"http://127.0.0.1:{canary.port}")
    assert local(says(200, b"picture")) == b"picture"
    assert canary.connections == 0


def test_the_answer_is_taken_whatever_its_content_type_says(local):
    assert local(says(200, b"picture", content_type="text/html")) == b"picture"


def test_a_chunked_body_is_put_together(local):
    body = b"4\r\npict\r\n3\r\nure\r\n0\r\n\r\n"
    assert local(says(200, body, content_length=None, transfer_encoding="chunked")) == b"picture"


def test_a_body_without_a_length_ends_with_the_connection(local):
    assert local(says(200, b"picture", content_length=None)) == b"picture"


# --- statuses


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 410, 418, 451])
def test_a_client_error_of_the_host_means_that_there_is_no_such_image(local, status):
    with pytest.raises(ImageNotFound):
        local(says(status))
    assert local.host.connections == 1


@pytest.mark.parametrize("status", [500, 502, 503, 504, 408, 425, 429, 201, 204, 206, 300, 304, 101])
def test_any_other_status_is_a_failure_of_the_host(local, status):
    with pytest.raises(ImageSourceFailed) as caught:
        local(says(status))
    assert (caught.value.retryable, local.host.connections) == (True, 1)


def test_nothing_of_an_expired_signature_is_told(local):
    with pytest.raises(ImageNotFound) as caught:
        local(says(403, b"<Error><Code>AccessDenied</Code></Error>"), "/a.jpg?X-Amz-Signature=5ecret")
    assert "5ecret" not in f"{caught.value!r} {caught.value.body('r')} {caught.value.__cause__!r}"
    assert "AccessDenied" not in str(caught.value.body("r"))


# --- redirects


def test_three_redirects_are_followed(public):
    assert public(redirects_to("/1", f"https://{HOST}/2", "3?a=b")) == b"picture"
    assert [request.split()[1] for request in public.host.requests] == [b"/person.jpg", b"/1", b"/2", b"/3?a=b"]


def test_a_fourth_redirect_is_refused(public):
    with pytest.raises(TooManyRedirects):
        public(redirects_to("/1", "/2", "/3", "/4"))
    assert public.host.connections == 4


def test_a_redirect_to_itself_ends(public):
    with pytest.raises(TooManyRedirects):
        public(lambda stream, request: says(302, location="")(stream, request))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_every_kind_of_redirect_is_followed(local, status):
    assert local(redirects_to("/next", status=status)) == b"picture"


def test_a_redirect_without_a_location_is_a_failure_of_the_host(local):
    with pytest.raises(ImageSourceFailed):
        local(says(302))


@pytest.mark.parametrize(
    "location",
    [
        METADATA,
        "https://169.254.169.254/",
        "//169.254.169.254/",
        f"http://{HOST}/person.jpg",
        f"https://{HOST}:8080/",
        f"https://u:p@{HOST}/",
        "https://localhost/",
        "file:///etc/passwd",
        "s3://results/users/u/a.jpg",
        "https://[::1]/",
        "https://[",
        "//[x",
        "https://images.example/\u00e9",
        "/a b",
        "/a#b",
    ],
)
def test_a_redirect_to_a_url_that_is_not_permitted_is_refused_undialled(public, dialled, location):
    with pytest.raises(UrlNotPermitted):
        public(lambda stream, request: stream.sendall(b"HTTP/1.1 302 X\r\nLocation: " + raw(location) + b"\r\n\r\n"))
    assert dialled == [(PUBLIC, 443)]


def raw(location):
    return location.encode("latin-1")


def test_a_redirect_to_a_private_name_is_refused_undialled(trust, trusted_tls, dialled, pool):
    with serving(redirects_to("https://inside.example/"), trusted_tls) as host:
        dialled.to[443] = host.port
        fetcher = HttpsFetcher(HostPolicy(), pool, lambda name, port: [PUBLIC if name == HOST else "10.0.0.5"])
        with pytest.raises(AddressNotPermitted):
            fetcher.fetch(f"https://{HOST}/", user_id="u", deadline=time.monotonic() + 5)
    assert dialled == [(PUBLIC, 443)]


def test_a_trusted_host_cannot_redirect_to_a_private_one(local, dialled):
    with pytest.raises(UrlNotPermitted):
        local(redirects_to(METADATA))
    assert len(dialled) == 1


# --- faults of the host


def test_a_refused_connection_is_a_failure_of_the_host(pool):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    fetcher = HttpsFetcher(HostPolicy(trusted_hosts=(f"127.0.0.1:{port}",)), pool)
    with pytest.raises(ImageSourceFailed):
        fetcher.fetch(f"http://127.0.0.1:{port}/", user_id="u", deadline=time.monotonic() + 5)


def reset(stream, request):
    stream.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\npart")
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")


@pytest.mark.parametrize(
    "answer",
    [
        reset,
        lambda stream, request: None,
        lambda stream, request: stream.sendall(b"HTTP/1.1 200"),
        lambda stream, request: stream.sendall(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"),
        lambda stream, request: stream.sendall(b"<html></html>\r\n\r\n"),
        lambda stream, request: stream.sendall(b"HTTP/1.1 200 OK\r\nA: " + b"x" * 1_000_000),
        lambda stream, request: stream.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"),
        lambda stream, request: stream.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"),
        says(200, b"picture", content_length=100),
        says(200, b"5\r\npict", content_length=None, transfer_encoding="chunked"),
        says(200, b"zz\r\npicture", content_length=None, transfer_encoding="chunked"),
    ],
    ids=[
        "reset in the body",
        "no answer",
        "half a status",
        "SSH",
        "HTML without a head",
        "endless header",
        "length is no number",
        "two lengths",
        "announced more than sent",
        "half a chunk",
        "chunk is no number",
    ],
)
def test_a_broken_answer_is_a_failure_of_the_host(local, answer):
    with pytest.raises(ImageSourceFailed):
        local(answer)


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        lambda stream, request: stream.recv(1),
        drips(HEAD, b"A: b\r\n"),
        drips(HEAD + b"Content-Length: 100000\r\n\r\n", b"12345"),
        drips(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        drips(HEAD + b"\r\n", b"x"),
    ],
    ids=["silence", "headers", "body", "chunks", "100 Continue", "body without a length"],
)
def test_a_dripped_answer_ends_at_the_total_time(local, monkeypatch, answer):
    monkeypatch.setattr(fetch, "TOTAL_S", 0.3)
    began = time.monotonic()
    with pytest.raises(ImageSourceTimeout):
        local(answer)
    assert 0.25 < time.monotonic() - began < 30  # what drips never ends


def test_redirects_share_one_total_time(local, monkeypatch):
    monkeypatch.setattr(fetch, "TOTAL_S", 0.3)

    def slow(stream, request):
        time.sleep(0.13)
        says(302, location="/again")(stream, request)

    with pytest.raises(ImageSourceTimeout):
        local(slow)


def test_the_requests_deadline_comes_before_the_total_time(local):
    began = time.monotonic()
    with pytest.raises(ImageSourceTimeout):
        local(drips(HEAD, b"A: b\r\n"), seconds=0.2)
    assert time.monotonic() - began < fetch.TOTAL_S


def test_after_the_deadline_nothing_is_dialled(local, dialled):
    with pytest.raises(ImageSourceTimeout):
        local(says(200, b"picture"), seconds=-1)
    assert dialled == []


def test_a_silent_tls_handshake_ends_at_the_deadline(dialled, pool):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dialled.to[443] = silent.getsockname()[1]
        began = time.monotonic()
        fetcher = HttpsFetcher(HostPolicy(), pool, lambda name, port: [PUBLIC])
        with pytest.raises(ImageSourceTimeout):
            fetcher.fetch(f"https://{HOST}/", user_id="u", deadline=began + 0.2)
        assert time.monotonic() - began < fetch.TOTAL_S


@pytest.mark.parametrize("length", [MAX_BYTES + 1, "9" * 20])
def test_a_file_that_is_announced_too_large_is_not_read(local, length):
    with pytest.raises(ImageTooLarge):
        local(says(200, content_length=length))


def test_an_endless_body_ends_when_it_is_too_large(local, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_BYTES", 1_000_000)
    sent = []

    def endless(stream, request):
        stream.sendall(HEAD + b"\r\n")
        while True:
            stream.sendall(b"x" * 65536)
            sent.append(65536)

    with pytest.raises(ImageTooLarge):
        local(endless)
    assert sum(sent) < 10_000_000


def test_the_largest_file_is_permitted(local):
    assert len(local(says(200, b"x" * MAX_BYTES))) == MAX_BYTES


def test_no_connection_is_left_open(local):
    """The host sees the end of every connection: its threads could not be joined otherwise."""
    ended = threading.Event()

    def answer(stream, request):
        says(200, b"picture")(stream, request)
        if stream.recv(1) == b"":
            ended.set()

    local(answer)
    assert ended.wait(30)


# --- TLS


@pytest.mark.parametrize(
    "made",
    [
        lambda authority: certificate(HOST),
        lambda authority: certificate(HOST, issuer=authority, days=-1),
        lambda authority: certificate("other.example", issuer=authority),
        lambda authority: certificate(HOST, issuer=certificate("Test authority")),
    ],
    ids=["self-signed", "expired", "wrong name", "unknown authority"],
)
def test_a_certificate_that_does_not_hold_is_a_failure_of_the_host(made, authority, trust, dialled, pool, tmp_path):
    with serving(says(200, b"picture"), server_context(tmp_path, *made(authority))) as host:
        dialled.to[443] = host.port
        with pytest.raises(ImageSourceFailed):
            refuse(f"https://{HOST}/", pool, PUBLIC)
        assert (host.connections, host.requests) == (1, [])


def test_a_host_that_speaks_no_tls_is_a_failure_of_the_host(trust, dialled, pool):
    with serving(says(200, b"picture")) as host:
        dialled.to[443] = host.port
        with pytest.raises(ImageSourceFailed):
            refuse(f"https://{HOST}/", pool, PUBLIC)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_a_host_of_tls_1_1_is_a_failure_of_the_host(authority, trust, dialled, pool, tmp_path):
    context = server_context(tmp_path, *certificate(HOST, issuer=authority))
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with serving(says(200, b"picture"), context) as host:
        dialled.to[443] = host.port
        with pytest.raises(ImageSourceFailed):
            refuse(f"https://{HOST}/", pool, PUBLIC)


# --- lists of hosts


@pytest.mark.parametrize(
    ("entry", "url"),
    [
        ("shop.example", "https://shop.example/a"),
        ("*.shop.example", "https://cdn.shop.example/a"),
        ("*.shop.example", "https://a.b.shop.example/a"),
        ("shop.example:8443", "https://shop.example:8443/a"),
        ("*.shop.example:8443", "https://cdn.shop.example:8443/a"),
        ("shop.example", "https://SHOP.example/a"),
    ],
)
def test_a_host_on_the_list_is_permitted(entry, url):
    assert not HostPolicy(image_hosts=("other.example", entry)).parse(url).trusted


@pytest.mark.parametrize(
    ("entry", "url"),
    [
        ("shop.example", "https://images.example/a"),
        ("shop.example", "https://cdn.shop.example/a"),
        ("shop.example", "https://shop.example.evil.test/a"),
        ("shop.example", "https://shop.example:8443/a"),
        ("*.shop.example", "https://shop.example/a"),
        ("*.shop.example", "https://evilshop.example/a"),
        ("*.shop.example", "https://cdn.shop.example:8443/a"),
        ("shop.example:8443", "https://shop.example/a"),
        ("shop.example", "http://shop.example/a"),
        ("shop.example", "https://u@shop.example/a"),
    ],
)
def test_a_host_beside_the_list_is_refused(entry, url):
    with pytest.raises(UrlNotPermitted):
        HostPolicy(image_hosts=(entry,)).parse(url)


def test_a_listed_host_with_a_private_address_is_refused(dialled, pool):
    with pytest.raises(AddressNotPermitted):
        refuse(f"https://{HOST}/", pool, "10.0.0.5", policy=HostPolicy(image_hosts=(HOST,)))
    assert dialled == []


def test_a_trusted_host_may_be_private_and_plain(local):
    assert local(says(200, b"picture")) == b"picture"


def test_only_the_named_port_of_a_trusted_host_is_trusted(local, canary):
    with pytest.raises(UrlNotPermitted):
        local(redirects_to(f"http://127.0.0.1:{canary.port}/"))
    assert canary.connections == 0


# --- s3:// references

BUCKET = "results"


@pytest.fixture(scope="module")
def s3():
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    session = boto3.session.Session("key", "secret", region_name="us-east-1")
    client = session.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket=BUCKET)
    client.put_object(Bucket=BUCKET, Key="shop/users/u1/row/1/row.jpg", Body=b"picture")
    yield client
    client.close()
    server.stop()


class Deaf:
    """An S3 client that must not be called."""

    def get_object(self, **request):
        raise AssertionError(request)


class Answering:
    """An S3 client whose get_object gives, or raises, one thing."""

    def __init__(self, answer):
        self._answer = answer

    def get_object(self, **request):
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


class Body:
    """The body of an object, which breaks off."""

    def __init__(self, failure):
        self._failure = failure

    def read(self):
        raise self._failure


def from_s3(client, ref, user_id="u1", seconds=5):
    return S3Fetcher(client, BUCKET, "shop/").fetch(ref, user_id=user_id, deadline=time.monotonic() + seconds)


def test_an_object_of_the_caller_is_read(s3):
    assert from_s3(s3, f"s3://{BUCKET}/shop/users/u1/row/1/row.jpg") == b"picture"


@pytest.mark.parametrize(
    "ref",
    [
        "s3://other-bucket/shop/users/u1/x.jpg",
        f"s3://{BUCKET}/shop/users/OTHER/x.jpg",
        f"s3://{BUCKET}/shop/users/u10/x.jpg",
        f"s3://{BUCKET}/shop/users/u1",
        f"s3://{BUCKET}/shop/users/u1/",
        f"s3://{BUCKET}/users/u1/x.jpg",
        f"s3://{BUCKET}/../x",
        f"s3://{BUCKET}/shop/users/u1/../u2/x.jpg",
        f"s3://{BUCKET}/shop/users/u1/./x.jpg",
        f"s3://{BUCKET}/shop/users/u1//x.jpg",
        f"s3://{BUCKET}/shop/users/u1/%2e%2e/x.jpg",
        f"s3://{BUCKET}/shop/users/u1/x.jpg?versionId=1",
        f"s3://{BUCKET}/shop/users/u1/x.jpg\n",
        f"s3://{BUCKET}/shop/users/u1/x\u2028.jpg",
        f"s3://{BUCKET}/shop/users/u1/x\ud800.jpg",
        f"s3://{BUCKET}/shop/users/u1/x#y.jpg",
        f"s3://{BUCKET}/shop/users/u1/..\\x.jpg",
        f"s3://{BUCKET}/shop/users/u1/" + "\u00e9" * 510,
        f"s3://{BUCKET}/",
        f"s3://{BUCKET}",
        "s3:///shop/users/u1/x.jpg",
        f"S3://{BUCKET}/shop/users/u1/x.jpg",
        f"s3://{BUCKET}/shop/users/u1/" + "x" * 1024,
    ],
)
def test_an_object_that_is_not_the_callers_is_refused_unread(ref):
    with pytest.raises(UrlNotPermitted):
        from_s3(Deaf(), ref)


@pytest.mark.parametrize("name", ["IMG 0001 (2).jpg", "a+b=c@d,e&f;g:h.jpg", "\uc0c1\uc758.jpg", "\u00e9t\u00e9.png"])
def test_a_key_may_have_what_files_of_users_are_called(s3, name):
    s3.put_object(Bucket=BUCKET, Key=f"shop/users/u1/items/{name}", Body=b"shirt")
    assert from_s3(s3, f"s3://{BUCKET}/shop/users/u1/items/{name}") == b"shirt"


def test_after_the_deadline_no_object_is_read():
    with pytest.raises(ImageSourceTimeout):
        from_s3(Deaf(), f"s3://{BUCKET}/shop/users/u1/x.jpg", seconds=-1)


def test_an_object_that_is_not_there_is_not_found(s3):
    with pytest.raises(ImageNotFound):
        from_s3(s3, f"s3://{BUCKET}/shop/users/u1/none.jpg")


def test_an_object_that_is_too_large_is_not_read():
    with pytest.raises(ImageTooLarge):
        from_s3(
            Answering({"ContentLength": MAX_BYTES + 1, "Body": Body(AssertionError())}),
            f"s3://{BUCKET}/shop/users/u1/x",
        )


def client_error(code, status):
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (client_error("AccessDenied", 403), ImageNotFound),
        (client_error("NoSuchKey", 404), ImageNotFound),
        (client_error("InternalError", 500), ImageSourceFailed),
        (client_error("SlowDown", 503), ImageSourceFailed),
        (EndpointConnectionError(endpoint_url="http://127.0.0.1:1"), ImageSourceFailed),
        (ReadTimeoutError(endpoint_url="http://127.0.0.1:1"), ImageSourceTimeout),
        ({"ContentLength": 7, "Body": Body(ReadTimeoutError(endpoint_url="x"))}, ImageSourceTimeout),
        ({"ContentLength": 7, "Body": Body(ConnectionResetError())}, ImageSourceFailed),
    ],
)
def test_a_fault_of_s3_has_its_error(answer, error):
    with pytest.raises(error):
        from_s3(Answering(answer), f"s3://{BUCKET}/shop/users/u1/x")


# --- by scheme


class Named:
    def __init__(self, name):
        self._name = name

    def fetch(self, ref, *, user_id, deadline):
        return self._name


@pytest.mark.parametrize(
    ("ref", "name"), [("s3://a/b", b"s3"), ("https://a.example/", b"https"), ("x", b"https"), ("S3://a/b", b"https")]
)
def test_a_reference_goes_to_the_fetcher_of_its_scheme(ref, name):
    assert ByScheme(Named(b"https"), Named(b"s3")).fetch(ref, user_id="u", deadline=0) == name


def test_without_a_bucket_an_s3_reference_is_refused(pool):
    with pytest.raises(UrlNotPermitted):
        ByScheme(HttpsFetcher(HostPolicy(), pool), None).fetch(
            f"s3://{BUCKET}/users/u1/x.jpg", user_id="u1", deadline=time.monotonic() + 5
        )
