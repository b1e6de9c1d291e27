"""ssrf: no URL of a stranger makes the process dial what is not a public https host."""

from __future__ import annotations

import ast
from pathlib import Path

from container.addresses import is_public
from container.fetch import addresses_of

from ..image_host import says
from ..registry import row
from ..services import REPOSITORY, Answer
from ..stage import FIELD_OF, Stage

METADATA = "http://169.254.169.254/latest/meta-data/"
ODD_HOSTS = ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0", "169.254.43518", "0251.0376.0251.0376"]
SAME_ID = {"X-Amzn-SageMaker-Inference-Id": "same"}


def ask_with(stage: Stage, url: str, field: str = "person_image_url") -> Answer:
    """The answer to a request with this URL in one field."""
    return stage.ask(stage.service, **{field: url})


def refuses(stage: Stage, urls: list[str], code: str = "url_not_permitted") -> None:
    """Each is refused with this code; nothing is dialled but the good URLs' host, and the canary not at all."""
    before = stage.canary_hits
    for url in urls:
        ask_with(stage, url).refused(422, code, retryable=False)
    assert stage.canary_hits == before, f"the canary was hit {stage.canary_hits - before} times"
    dialled = [entry for entry in stage.dialled(stage.service) if entry[3] == "canary"]
    assert not dialled, f"dialled {dialled}"


def refuses_alone(stage: Stage, urls: list[str]) -> None:
    """As `refuses`, in all four fields at once, so that not one socket may be opened."""
    service = stage.service
    for url in urls:
        with stage.nothing_dialled(service):
            stage.ask(service, **dict.fromkeys(FIELD_OF.values(), url)).refused(422, "url_not_permitted")
    refuses(stage, urls)


@row("S01")
def metadata_in_each_field(stage: Stage) -> None:
    """Refused alike in each field."""
    refuses(stage, [METADATA])
    bodies = set()
    for field in FIELD_OF.values():
        answer = stage.post(stage.service, stage.fields(**{field: METADATA}), SAME_ID)
        answer.refused(422, "url_not_permitted")
        bodies.add(answer.content)
    assert len(bodies) == 1, bodies


@row("S02")
def loopback_literals(stage: Stage) -> None:
    """No socket is opened."""
    refuses_alone(stage, ["https://127.0.0.1/", "https://localhost/", "https://0.0.0.0/", "https://[::1]/"])


@row("S03")
def private_literals(stage: Stage) -> None:
    """Private ranges as addresses."""
    refuses_alone(
        stage, ["https://10.0.0.5/", "https://172.16.0.1/", "https://172.31.255.254/", "https://192.168.1.1/"]
    )


@row("S04")
def names_of_private_addresses(stage: Stage) -> None:
    """A name whose answers are not all public is refused undialled."""
    names = ["loopback", "private", "metadata", "metadata6", "mixed", "mapped"]
    refuses(stage, [f"https://{name}.example/a.png" for name in names], "address_not_permitted")


@row("S05")
def other_schemes(stage: Stage) -> None:
    """https and nothing else."""
    refuses_alone(
        stage,
        [
            "file:///etc/passwd",
            "ftp://images.example/a.png",
            "gopher://images.example/_x",
            "data:image/png;base64,AAAA",
            "jar:https://images.example/a!/b",
            "dict://images.example/d",
            "ldap://images.example/o",
            "//images.example/a.png",
            "http://images.example/a.png",
        ],
    )


@row("S06")
def redirect_to_metadata(stage: Stage) -> None:
    """The second hop is refused undialled."""
    for status in (301, 302, 303, 307, 308):
        refuses(stage, [stage.host.behave(f"S06/{status}", says(status, location="http://169.254.169.254/"))])
    secure = stage.host.behave("S06/secure", says(302, location="https://169.254.169.254/"))
    private = stage.host.behave("S06/private", says(302, location="https://private.example/"))
    refuses(stage, [secure])
    refuses(stage, [private], "address_not_permitted")
    assert stage.host.asked("S06/302") == 1


@row("S07")
def odd_spellings_of_addresses(stage: Stage) -> None:
    """Refused by the grammar; and past it, by the address that the system reads in them."""
    refuses_alone(stage, [f"https://{host}/" for host in ODD_HOSTS])
    for host in ODD_HOSTS:
        assert not any(is_public(address) for address in addresses_of(host, 443)), host


@row("S08")
def userinfo(stage: Stage) -> None:
    """A name in front of an @ is no host."""
    refuses_alone(
        stage,
        [
            "https://images.example@evil.test/",
            "https://u:p@images.example/",
            "https://@images.example/",
            "https://images.example\\@evil.test/",
            "https://images.example#@evil.test/",
        ],
    )


@row("S19")
def other_ports(stage: Stage) -> None:
    """443 and nothing else, in one spelling."""
    ports = ["22", "25", "6379", "2375", "8080", str(stage.service.port), "0", "65536", "99999", "0x50", "-1"]
    refuses_alone(stage, [f"https://images.example:{port}/" for port in ports])


@row("S22")
def bad_certificates(stage: Stage) -> None:
    """Not one of them is accepted, and no code that would do so exists."""
    for name in ("self-signed", "expired", "wrong-name", "old-tls"):
        host = stage.hosts[f"{name}.example"]
        ask_with(stage, f"https://{name}.example/good/person.png").refused(502, "image_source_failed", retryable=True)
        assert host.connections > 0, f"{name}: it was not even dialled"
        assert not getattr(host, "requests", None), f"{name}: a request was sent to it"
    assert not (found := unverified_tls()), f"verification can be turned off in {found}"


def unverified_tls() -> list[str]:
    """The places in our sources where a certificate is not verified."""
    found = []
    for folder in ("container", "model", "deploy"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            found += [f"{path.relative_to(REPOSITORY)}:{line}" for line in _unverified(path)]
    return found


def _unverified(path: Path) -> list[int]:
    lines = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.keyword) and node.arg in ("verify", "check_hostname", "cert_reqs"):
            value = node.value
            lines += [value.lineno] if not (isinstance(value, ast.Constant) and value.value is True) else []
        if isinstance(node, ast.Attribute) and node.attr in ("CERT_NONE", "_create_unverified_context"):
            lines.append(node.lineno)
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Attribute) and target.attr in ("check_hostname", "verify_mode")
            for target in node.targets
        ):
            lines.append(node.lineno)
    return lines


@row("S24")
def other_peoples_objects(stage: Stage) -> None:
    """GetObject is called for the caller's own keys only."""
    bucket = stage.bucket
    others = [
        "s3://other-bucket/users/s24/x.jpg",
        f"s3://{bucket}/users/OTHER/x.jpg",
        f"s3://{bucket}/../x",
        f"s3://{bucket}/users/s24/../OTHER/x.jpg",
        f"s3://{bucket}/users/s240/x.jpg",
        "s3:///key",
    ]
    before = stage.front.count("GET", "")
    refuses(stage, others)
    assert stage.front.count("GET", "") == before, "GetObject was called"
    stage.s3.put_object(Bucket=bucket, Key="users/s24/x.png", Body=b"no picture")
    ask_with(stage, f"s3://{bucket}/users/s24/x.png").refused(422, "image_not_decodable")
