"""What nobody thought of: requests by the OpenAPI description, URLs, files and bodies."""

from __future__ import annotations

import contextlib
import io
import ipaddress
import json
import re
import socket
import zlib
from functools import cache, partial
from urllib.parse import urlsplit

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from stand_in import FakeFetcher, StandInMasker, noise, png, running_app, usual_request

from container.errors import (
    ImageFormatNotPermitted,
    ImageNotDecodable,
    ImageNotFound,
    ImageSourceTimeout,
    ImageTooManyPixels,
    ImageTooSmall,
    InvalidJson,
    InvalidRequest,
    Outage,
    Refusal,
    UrlNotPermitted,
)
from container.fetch import HostPolicy
from container.images import MAX_ASPECT, MAX_PIXELS, MIN_SIDE, decode, decode_mask
from container.request import MAX_URL_CHARACTERS, MaskRequest, TryOnRequest, parse
from container.strict_json import loads
from container.vton_api import create_app
from deploy.demo import http_server

# The same examples in every run, and none kept for the next: what fails here fails everywhere.
fuzz = partial(
    settings,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


# --- the API, by its own description

DOCUMENTED_OUTAGES = {502, 503, 504}  # those of a neighbour; 500 is a fault of ours
ERRORS = {kind.code: kind for kind in (*Refusal.__subclasses__(), *Outage.__subclasses__())}
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
GARMENTS = {f"{name}_cloth_url": f"https://images.example/{name}.png" for name in ("upper", "lower")}


class AnyFetcher(FakeFetcher):
    """Something for every URL: mostly a picture, else what is no picture, nothing, or a host that is too slow."""

    def fetch(self, ref, *, user_id, deadline):
        kind = zlib.crc32(ref.encode()) % 16
        if kind == 0:
            raise ImageNotFound(ref)
        if kind == 1:
            raise ImageSourceTimeout(ref)
        return b"GIF89a" if kind == 2 else png(noise(80, 70, seed=kind))


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    running = running_app(folder, fetcher=AnyFetcher(), masker=StandInMasker(), docs=True)
    with running as app, http_server(create_app(app)) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")
        assert app.admission.taken == 0


def answer_to(case):
    """The status of the answer, once it is as described and, where it is an error, says nothing of what was sent."""
    response = case.call()
    case.validate_response(response, checks=CHECKS)
    if response.status_code != 200:
        refuse_echo(case, response.json()["error"], response.status_code)
    return response.status_code


def refuse_echo(case, error, status):
    kind = ERRORS[error["code"]]
    assert (error["message"], status) == (kind.public, kind.status)
    assert re.fullmatch("[0-9a-f]{32}", error["request_id"])
    if error.get("field") not in {*TryOnRequest.model_fields, *MaskRequest.model_fields, None}:
        assert error["field"] in case.body  # a member that there is none of, by its name
        assert re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,63}", error["field"])
    assert "object_key" not in error


def test_every_path_is_described(api):
    assert {(path, method) for path in api for method in api[path]} == {
        ("/invocations", "post"),
        *((path, "get") for path in ("/ping", "/execution-parameters", "/metrics")),
    }


def test_what_the_description_allows_is_made_or_refused_as_it_says(api):
    answered = []

    @given(api["/invocations"]["POST"].as_strategy(generation_mode=GenerationMode.POSITIVE))
    @fuzz(max_examples=60)
    def ask(case):
        if case.body.get("task") != "mask":  # which garments a type needs is beyond JSON Schema
            case.body = {**case.body, **GARMENTS, "overall_cloth_url": None}
        answered.append(answer_to(case))

    ask()
    assert answered.count(200) >= len(answered) / 4
    assert {status for status in answered if status >= 500} <= DOCUMENTED_OUTAGES


def test_what_the_description_forbids_is_refused(api):
    answered = set()

    @given(api["/invocations"]["POST"].as_strategy(generation_mode=GenerationMode.NEGATIVE))
    @fuzz(max_examples=80)
    def ask(case):
        answered.add(answer_to(case))

    ask()
    assert 422 in answered
    assert answered <= {400, 415, 422}


@pytest.mark.parametrize("path", ["/ping", "/execution-parameters", "/metrics"])
def test_the_other_paths_answer_as_described(api, path):
    @given(api[path]["GET"].as_strategy())
    @fuzz(max_examples=5)
    def ask(case):
        assert answer_to(case) == 200

    ask()


# --- URLs

POLICIES = [
    HostPolicy(),
    HostPolicy(image_hosts=("images.example", "*.cdn.example", "shop.example:8443")),
    HostPolicy(trusted_hosts=("127.0.0.1:9000", "images.example:80")),
    HostPolicy(image_hosts=("images.example",), trusted_hosts=("localhost:9000",)),
]
HOSTS = [
    *("images.example", "IMAGES.example", "images.example.", "a.cdn.example", "cdn.example", "evilcdn.example"),
    *("images.example.evil.example", "shop.example", "localhost", "images", "a..b.example", "-a.example", "xn--a.b"),
    *("127.0.0.1", "127.1", "0x7f.0.0.1", "2130706433", "0177.0.0.01", "169.254.169.254", "1.2.3.4.", "1e3.7f"),
    *(
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[fe80::1%25eth0]",
        "127.0.0.1%00.example",
        "images\u3002example",
        "\uff11\uff12\uff17.0.0.1",
    ),
    *(
        "images.example@evil.example",
        "evil.example\\@images.example",
        "images.example#@evil.example",
        "\u0131mages.example",
    ),
]
PORTS = ["", ":443", ":0443", ":80", ":8443", ":9000", ":99999", ":", ":-1", ":٤٤٣", ":443:80", ":443 "]
SCHEMES = [
    "https://",
    "http://",
    "HTTPS://",
    "https:/",
    "https:///",
    "https:\\\\",
    "//",
    "ftp://",
    "file://",
    " https://",
]
TAILS = [
    "",
    "/",
    "/a.png",
    "/a%2e%2e/b",
    "/../x",
    "?q=1",
    "/a?q=//b@c#d",
    "#",
    "/\r\nHost: evil",
    "/\\evil",
    "/é",
    "/%00",
]
TRICKS = '\t\n\r \0@:/\\#?%[]<>|^`{}"é\uff0f\uff20\uff0e\ud800'


@st.composite
def urls(draw):
    """A URL of good and odd parts, and in some a character where none belongs."""
    url = "".join(draw(st.just(parts[0]) | st.sampled_from(parts)) for parts in (SCHEMES, HOSTS, PORTS, TAILS))
    for trick in draw(st.text(TRICKS, max_size=2)):
        at = draw(st.integers(0, len(url)))
        url = url[:at] + trick + url[at:]
    return url


def is_address(host):
    """Whether anything that dials reads the host as an address: "127.1" and "0x7f000001" are."""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    with contextlib.suppress(OSError):
        return bool(socket.inet_aton(host))
    return False


@given(st.sampled_from(POLICIES), urls() | urls() | st.text(max_size=80))
@example(POLICIES[0], "https://images.example/a.png")
@example(POLICIES[1], "https://shop.example:8443/a.png")
@example(POLICIES[2], "http://127.0.0.1:9000/a.png")
@fuzz(max_examples=2000)
def test_a_url_is_refused_or_read_as_everyone_reads_it_and_within_the_rules(policy, url):
    try:
        target = policy.parse(url)
    except UrlNotPermitted:
        return
    parts = urlsplit(url)
    default = {"https": 443, "http": 80}[target.scheme]
    assert (parts.scheme, parts.hostname, parts.port or default) == (target.scheme, target.host, target.port)
    assert (parts.username, parts.password, parts.fragment) == (None, None, "")
    assert len(url) <= MAX_URL_CHARACTERS
    assert re.fullmatch(r"[\x21-\x7e]+", url)
    assert policy.parse(target.url) == target
    if target.trusted:
        assert f"{target.host}:{target.port}" in policy.trusted_hosts
        return
    assert target.scheme == "https"
    assert not is_address(target.host)
    if not policy.image_hosts:
        assert target.port == 443
        assert "." in target.host
    else:
        place = target.host, target.port
        own = policy is POLICIES[1] and (place == ("shop.example", 8443) or place[0].endswith(".cdn.example"))
        assert own or place == ("images.example", 443)


# --- files of pictures

MODES = {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "RGBA", "P", "L", "LA", "1", "I;16"), "WEBP": ("RGB", "RGBA")}
OPTIONS = {"JPEG": ({}, {"progressive": True}), "PNG": ({},), "WEBP": ({}, {"lossless": True})}
IMAGE_REFUSALS = (ImageNotDecodable, ImageFormatNotPermitted, ImageTooSmall, ImageTooManyPixels)
DAMAGED_EXIF = pytest.mark.filterwarnings("ignore::UserWarning")  # what Pillow says of it


@cache
def real_files():
    """A file of every format in each of its modes, some with EXIF, and one that moves."""
    exif = Image.Exif()
    exif[0x0112] = 6
    drawn = Image.fromarray(np.linspace(0, 255, 96 * 80 * 3).reshape(96, 80, 3).astype(np.uint8))
    files = []
    for kind, modes in MODES.items():
        for mode in modes:
            picture = drawn.convert("L").convert("I;16") if mode == "I;16" else drawn.convert(mode)
            for options in OPTIONS[kind]:
                files += [saved(picture, kind, **options), saved(picture, kind, exif=exif, **options)]
    return [*files, saved(drawn, "WEBP", save_all=True, append_images=[drawn.rotate(90)])]


def saved(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@st.composite
def damaged_files(draw):
    """A real file with bits flipped, a part of another one in it, or its end missing."""
    content = bytearray(draw(st.sampled_from(real_files())))
    # Half of the damage is near the beginning, where a file says what it is.
    places = st.integers(0, min(200, len(content) - 1)) | st.integers(0, len(content) - 1)
    for at in draw(st.lists(places, max_size=8)):
        content[at] ^= 1 << draw(st.integers(0, 7))
    if draw(st.booleans()):
        other, at, length = draw(st.sampled_from(real_files())), draw(places), draw(st.integers(0, 64))
        content[at : at + draw(st.integers(0, 64))] = other[at : at + length]
    return bytes(content[: draw(places)] if draw(st.booleans()) else content)


def test_the_files_are_pictures_until_they_are_damaged():
    *still, moving = real_files()
    assert all(decode(content).shape in {(96, 80, 3), (80, 96, 3)} for content in still)
    with pytest.raises(ImageFormatNotPermitted):
        decode(moving)


@DAMAGED_EXIF
@given(damaged_files() | st.binary(max_size=300))
@fuzz(max_examples=600)
def test_a_file_is_refused_or_a_picture_within_the_limits(content):
    with contextlib.suppress(*IMAGE_REFUSALS):
        picture = decode(content)
        height, width, channels = picture.shape
        assert (picture.dtype, channels) == (np.uint8, 3)
        assert min(height, width) >= MIN_SIDE
        assert max(height, width) <= MAX_ASPECT * min(height, width)
        assert height * width <= MAX_PIXELS
        assert decode_mask(content).shape == (height, width)


# --- bodies

TOKENS = [
    *('"', "\\", "{", "}", "[", "]", ",", ":", "null", "true", "NaN", "-Infinity", "1e999", "-0", "0.1", "9" * 400),
    *(
        '"userId":"8",',
        '"task":"mask",',
        '"body":{',
        "[" * 2000,
        "\\ud800",
        "\\u0000",
        "\\/",
        "\ufeff",
        "\x00",
        "\n",
        "é",
    ),
]


@st.composite
def bodies(draw):
    """A good request's JSON with odd URLs, and a few edits."""
    names = draw(st.sets(st.sampled_from(["person_image_url", "upper_cloth_url", "mask_image_url", "timestamp"])))
    text = json.dumps(usual_request(**{name: draw(urls()) for name in names}))
    for token in draw(st.lists(st.sampled_from(TOKENS), max_size=3)):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + token + text[at + draw(st.integers(0, 6)) :]
    return text.encode("utf-8", "surrogatepass")


@given(bodies() | st.binary(max_size=200))
@example(json.dumps(usual_request()).encode())
@fuzz(max_examples=600)
def test_a_body_is_no_json_no_request_or_a_job_with_an_identity(body):
    try:
        value = loads(body)
    except InvalidJson:
        return
    assert json.loads(json.dumps(value)) == value
    with contextlib.suppress(InvalidRequest):
        assert re.fullmatch("[0-9a-f]{64}", parse(value).job_id())
