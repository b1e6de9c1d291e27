"""Image files to upright RGB arrays within limits, and arrays to files without metadata."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from container.errors import (
    ImageFormatNotPermitted,
    ImageNotDecodable,
    ImageTooManyPixels,
    ImageTooSmall,
)
from model.interface import Image as Pixels

FORMATS = ("JPEG", "PNG", "WEBP")
MIN_SIDE = 64  # px; below it the engine's latents have no room
MAX_PIXELS = 50_000_000  # a 48 MP phone photo fits
MAX_ASPECT = 8
WHITE, BLACK = 255, 0
SIGNATURES = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG"}
OTHER_FORMATS = (
    b"GIF8",
    b"BM",
    b"II*\x00",
    b"MM\x00*",
    b"8BPS",
    b"\x00\x00\x01\x00",
    b"%!PS",
    b"\x00\x00\x00\x0cjP",
    b"<svg",
)
FILE_OF: dict[str, tuple[str, str]] = {  # output_format -> suffix, content type
    "jpeg": ("jpg", "image/jpeg"),
    "png": ("png", "image/png"),
    "webp": ("webp", "image/webp"),
}


def decode(content: bytes, background: int = WHITE) -> Pixels:
    """The picture in an image file, upright and without alpha.

    Args:
        content: of a JPEG, PNG or WebP file, told by its content.
        background: grey level that shows through transparent pixels.
    Returns:
        HWC uint8 RGB, at least `MIN_SIDE` a side, at most `MAX_PIXELS`.
    Raises:
        ImageFormatNotPermitted, ImageNotDecodable, ImageTooSmall, ImageTooManyPixels.
    """
    name = _format_of(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Pillow warns of bombs and of damaged metadata
            warnings.simplefilter("ignore", UserWarning)  # damaged EXIF alone spoils no picture
            with Image.open(io.BytesIO(content), formats=[name]) as opened:
                _check_size(*opened.size)
                if getattr(opened, "is_animated", False):
                    raise ImageFormatNotPermitted("animated")
                opened.load()
                upright = ImageOps.exif_transpose(opened)
                return _flatten(upright, background)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, struct.error, OverflowError) as exc:
        raise ImageNotDecodable(f"{name}: {type(exc).__name__}") from exc
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as exc:
        raise ImageTooManyPixels(type(exc).__name__) from exc


def decode_mask(content: bytes) -> Pixels:
    """The grey levels of a mask file; what is transparent is black, that is, kept.

    Returns:
        HW uint8.
    Raises:
        What `decode` raises.
    """
    return np.asarray(Image.fromarray(decode(content, background=BLACK)).convert("L"))


def encode(image: Pixels, output_format: str, quality: int) -> bytes:
    """An image file with the pixels and nothing else: no EXIF, no profile, no comment.

    Args:
        image: HWC uint8 RGB.
        output_format: "jpeg", "png" or "webp"; PNG is lossless.
        quality: 1-100 for JPEG and WebP. JPEG keeps full colour resolution, so that cloth edges do not bleed.
    """
    file = io.BytesIO()
    picture = Image.fromarray(image)
    if output_format == "png":
        picture.save(file, "PNG", compress_level=6)
    elif output_format == "webp":
        picture.save(file, "WEBP", quality=quality, method=4)
    else:
        picture.save(file, "JPEG", quality=quality, subsampling=0, optimize=True)
    return file.getvalue()


def _format_of(content: bytes) -> str:
    for signature, name in SIGNATURES.items():
        if content.startswith(signature):
            return name
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    if content.lstrip()[:4].lower().startswith(OTHER_FORMATS) or content.startswith(OTHER_FORMATS):
        raise ImageFormatNotPermitted("another image format")
    if content[4:8] == b"ftyp":  # HEIC and AVIF
        raise ImageFormatNotPermitted("another image format")
    raise ImageNotDecodable("no known signature")


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ImageNotDecodable("empty")
    if width * height > MAX_PIXELS:
        raise ImageTooManyPixels(f"{width}x{height}")
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageTooSmall(f"{width}x{height}")


def _flatten(picture: Image.Image, background: int) -> Pixels:
    """RGB of any mode; 16-bit grey is scaled, not clipped."""
    if picture.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        grey = (np.asarray(picture).astype(np.float64) / 257.0).round().clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, (background, background, background, 255))
        canvas.alpha_composite(layer)
        picture = canvas
    return np.asarray(picture.convert("RGB"))
