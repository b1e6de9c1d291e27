"""image_decode: a stranger's file becomes the right pixels, or one clear refusal that cost nothing."""

from __future__ import annotations

import ast
import io
import re

import numpy as np
from PIL import Image as Pillow

from .. import files
from ..pictures import Pixels, file_of, pixels_of, ramp
from ..registry import row
from ..services import REPOSITORY, Answer, patience
from ..stage import Stage

TRIES = 5  # where milliseconds are promised, the best counts: others use the machine too
SAME_PSNR_DB = 35.0
UPRIGHT = {  # EXIF orientation -> how an upright picture is stored
    1: None,
    2: Pillow.Transpose.FLIP_LEFT_RIGHT,
    3: Pillow.Transpose.ROTATE_180,
    4: Pillow.Transpose.FLIP_TOP_BOTTOM,
    5: Pillow.Transpose.TRANSPOSE,
    6: Pillow.Transpose.ROTATE_90,
    7: Pillow.Transpose.TRANSVERSE,
    8: Pillow.Transpose.ROTATE_270,
}


def ask_with(stage: Stage, name: str, content: bytes, field: str = "person_image_url", **changes: object) -> Answer:
    """The answer to a request one of whose files is this; only what an upper garment needs is fetched."""
    url = stage.host.put(f"{stage.row}/{re.sub(r'[^A-Za-z0-9]', '-', name)}.jpg", content, "image/jpeg")
    changes = {"cloth_type": "upper", "lower_cloth_url": None, **changes}
    return stage.ask(stage.service, **{**changes, field: url})


def picture_of(stage: Stage, name: str, content: bytes, field: str = "person_image_url") -> Pixels:
    """The result for this file, from a lossless PNG; outside the mask it shows the person."""
    done = ask_with(stage, name, content, field, output_format="png").done()
    return pixels_of(stage.stored(done["object_key"]))


def refuses(stage: Stage, found: dict[str, bytes], *codes: str) -> None:
    """Each file is refused with one of the codes, as person and as garment, and nothing is made of it."""
    with stage.nothing_happens(stage.service):
        for name, content in found.items():
            for field in ("person_image_url", "upper_cloth_url"):
                answer = ask_with(stage, name, content, field)
                assert answer.status == 422, f"{name}: {answer.status} {answer.content[:200]!r}"
                error = answer.json()["error"]
                assert error["code"] in codes, f"{name}: {error}"
                assert "0x" not in error["message"], error


def refuses_cheaply(stage: Stage, name: str, content: bytes, code: str, *, limit_s: float, limit_bytes: float) -> str:
    """The file is refused in time and takes little memory: beyond what a file takes that is refused unopened."""
    usual, unopened = _least(stage, "unopened", b"no picture", "image_not_decodable")
    peak, opened = _least(stage, name, content, code)
    more_s, more_bytes = opened - unopened, peak - usual
    assert more_s < limit_s * patience(), f"{name}: {more_s * 1000:.0f} ms longer than a file that is not opened"
    assert more_bytes < limit_bytes, f"{name}: {more_bytes} bytes more than for a file that is not opened"
    return f"{name}: {more_s * 1000:+.0f} ms"


def _least(stage: Stage, name: str, content: bytes, code: str) -> tuple[int, float]:
    """Bytes and seconds that the refusal takes, each the least of some tries: the rest is other work's."""
    peaks, seconds = [], []
    for _ in range(TRIES):
        with stage.service.peak() as grown:
            answer = ask_with(stage, name, content)
        answer.refused(422, code)
        peaks.append(grown[0])
        seconds.append(answer.seconds)
    return min(peaks), min(seconds)


@row("I01")
def no_images(stage: Stage) -> None:
    """Files that are none."""
    refuses(stage, files.no_images(), "image_not_decodable")


@row("I02")
def cut_files(stage: Stage) -> None:
    """The last fifth is missing; what is there is not taken for the whole."""
    whole = {kind: file_of(ramp(400, 500), kind) for kind in ("JPEG", "PNG", "WEBP")}
    refuses(stage, {kind: content[: len(content) * 4 // 5] for kind, content in whole.items()}, "image_not_decodable")
    sources = "".join(path.read_text() for path in (REPOSITORY / "container").rglob("*.py"))
    assert "LOAD_TRUNCATED_IMAGES" not in sources


@row("I03")
def foreign_formats(stage: Stage) -> str:
    """Refused by their first bytes; every call that opens a picture names the three formats."""
    found = files.foreign_formats()
    refuses(stage, found, "image_format_not_permitted", "image_not_decodable")
    for path in (REPOSITORY / "container").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Image.open", "Pillow.open"):
                opened = {keyword.arg for keyword in node.keywords}
                assert "formats" in opened or path.name == "cli.py", f"{path.name}:{node.lineno} opens any format"
    return f"{len(found)} formats; the service's only way to open a picture names its format"


@row("I04")
def bombs(stage: Stage) -> str:
    """Refused by the header."""
    limits = {"limit_s": 0.1, "limit_bytes": 10e6}
    code = "image_too_many_pixels"
    announced = refuses_cheaply(stage, "50,000 a side", files.png_header(50_000, 50_000), code, **limits)
    held = refuses_cheaply(stage, "13,000 a side", files.png_bomb(13_000), code, **limits)
    return f"{announced}, {held}"


@row("I08")
def damaged_pngs(stage: Stage) -> None:
    """Every damage is found."""
    refuses(stage, files.damaged_pngs(), "image_not_decodable")


@row("I09")
def odd_sizes(stage: Stage) -> None:
    """64x64 is the smallest."""
    sizes = [(1, 1), (2, 2), (63, 64), (64, 63), (1, 20_000), (20_000, 64)]
    found = {f"{width}x{height}": file_of(Pillow.new("RGB", (width, height))) for width, height in sizes}
    refuses(stage, found, "image_too_small")
    ask_with(stage, "64x64", file_of(ramp(64, 64))).done()


@row("I10")
def orientations(stage: Stage) -> str:
    """The eight ways to store one photo give one result."""
    photo, results = Pillow.fromarray(ramp(384, 512)), []
    for orientation, turn in UPRIGHT.items():
        exif = Pillow.Exif()
        exif[files.ORIENTATION] = orientation
        stored = photo if turn is None else photo.transpose(turn)
        results.append(picture_of(stage, f"turned {orientation}", file_of(stored, "JPEG", quality=95, exif=exif)))
    worst = min(_psnr_db(results[0], result) for result in results[1:])
    assert worst > SAME_PSNR_DB, f"{worst:.1f} dB"
    return f"at least {min(worst, 99.0):.0f} dB"


@row("I12")
def sixteen_bits(stage: Stage) -> None:
    """Scaled, not clipped."""
    colour = ramp(384, 512)
    grey = colour[..., 0]
    for name, picture in (("colour", colour), ("grey", grey)):
        deep = picture_of(stage, f"{name} 16", files.deep_png(picture)).astype(float)
        usual = picture_of(stage, f"{name} 8", file_of(picture)).astype(float)
        assert abs(deep.mean() - usual.mean()) < 0.02 * usual.mean(), f"{name}: {deep.mean()} {usual.mean()}"
        assert np.abs(deep - usual)[:200].max() <= 2, name


@row("I13")
def transparency(stage: Stage) -> None:
    """On white."""
    clear = np.zeros((256, 192, 4), np.uint8)
    clear[...] = (255, 0, 0, 0)
    soft = np.dstack([ramp(), np.full((256, 192), 255, np.uint8)])
    soft[:64, :, 3] = np.linspace(0, 200, 64, dtype=np.uint8)[:, None]
    soft[:8, :, 3] = 0
    grey = Pillow.fromarray(clear, "RGBA").convert("LA")
    palette = Pillow.new("P", (192, 256), 0)
    palette.putpalette([255, 0, 0] + [0, 0, 255] * 255)
    found = {
        "RGBA": file_of(Pillow.fromarray(clear, "RGBA")),
        "soft": file_of(Pillow.fromarray(soft, "RGBA")),
        "LA": file_of(grey),
        "P": file_of(palette, "PNG", transparency=0),
    }
    for name, content in found.items():
        corner = picture_of(stage, name, content)[0, 0]
        assert tuple(corner) == (255, 255, 255), f"{name}: the corner is {tuple(corner)}"
    opaque = picture_of(stage, "soft", found["soft"])[900:, 10]
    assert np.abs(opaque.astype(int) - picture_of(stage, "plain", file_of(ramp()))[900:, 10]).max() <= 1


@row("I16")
def animated(stage: Stage) -> str:
    """Refused without a look at the frames."""
    told = []
    for name, content in files.animations().items():
        code = "image_format_not_permitted"
        told.append(refuses_cheaply(stage, name, content, code, limit_s=0.2, limit_bytes=10e6))
    return ", ".join(told)


@row("I20")
def metadata(stage: Stage) -> None:
    """Results carry pixels and nothing else."""
    for field in ("person_image_url", "upper_cloth_url"):
        for kind in ("jpeg", "png", "webp"):
            content = files.with_metadata(ramp()) if kind != "png" else files.png_with_text(ramp())
            done = ask_with(stage, f"tagged {kind}", content, field, output_format=kind).done()
            _has_no_metadata(stage.stored(done["object_key"]))


def _has_no_metadata(content: bytes) -> None:
    for tag in (b"Exif\0\0", b"http://ns.adobe.com", b"ICC_PROFILE", b"SecretPhone", b"xmpmeta", b"a comment", b"tEXt"):
        assert tag not in content, f"{tag!r} is in the result"
    with Pillow.open(io.BytesIO(content)) as opened:
        assert not opened.getexif(), dict(opened.getexif())
        left = set(opened.info) & {"exif", "xmp", "icc_profile", "comment", "Author"}
        assert not left, left


def _psnr_db(one: Pixels, other: Pixels) -> float:
    error = np.square(one.astype(float) - other.astype(float)).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))
