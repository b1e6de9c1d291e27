"""Image files to upright RGB arrays within limits, and arrays to files without metadata."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError

from container.colours import ToSRGB, as_stored, to_srgb
from container.errors import (
    ImageFormatNotPermitted,
    ImageNotDecodable,
    ImageTooManyPixels,
    ImageTooSmall,
)
from model.interface import Image as Pixels

MIN_SIDE = 64  # px; below it the engine's latents have no room
MAX_SIDE = 1_000_000  # px; beyond it a header is damaged, not a picture large
MAX_PIXELS = 50_000_000  # a 48 MP phone photo fits
MAX_ASPECT = 8
FREE_PIXELS = 16_000_000  # any file may have as many as a phone's photo, whatever its bytes
PIXELS_PER_BYTE = {  # beyond them; more is a bomb, or a header without a picture
    "JPEG": 1_000,  # 512 at most: a bit for a block of 8x8
    "PNG": 10_000,  # 8,256 at most: a bit for a pixel, by deflate's 1032:1
    "WEBP": 50_000,  # a plain lossless one has 24,000 as it is usually written (measured); 38 bytes could be any size
}
BAND_ROWS = 256  # converted at a time, so that a large picture is not in memory several times
WHITE, BLACK = 255, 0
ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = {  # orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type -> samples of a pixel
PALETTE = 3  # the colour type
ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)  # x, y, steps
PIECE_BYTES = 2**14  # of a PNG, inflated at a time: to 17 MB at most
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SIGNATURES = {b"\xff\xd8\xff": "JPEG", PNG_SIGNATURE: "PNG"}
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
MAX_WEBP_SIDE = 16_383  # px, of the format
FILE_OF: dict[str, tuple[str, str]] = {  # output_format -> suffix, content type
    "jpeg": ("jpg", "image/jpeg"),
    "png": ("png", "image/png"),
    "webp": ("webp", "image/webp"),
}


def decode(content: bytes, background: int = WHITE) -> Pixels:
    """The picture in an image file, upright, without alpha, its colours in sRGB.

    Args:
        content: of a JPEG, PNG or WebP file, told by its content.
        background: grey level that shows through transparent pixels.
    Returns:
        HWC uint8 RGB, at least `MIN_SIDE` a side, at most `MAX_PIXELS`.
    Raises:
        ImageFormatNotPermitted, ImageNotDecodable, ImageTooSmall, ImageTooManyPixels.
    """
    return _decode(content, background, to_srgb)


def decode_mask(content: bytes) -> Pixels:
    """The grey levels of a mask file as they are stored; what is transparent is black, that is, kept.

    Returns:
        HW uint8.
    Raises:
        What `decode` raises.
    """
    levels = _decode(content, BLACK, lambda profile, mode: as_stored)
    return np.asarray(Image.fromarray(levels).convert("L"))


def _decode(content: bytes, background: int, managed: Callable[[bytes | None, str], ToSRGB]) -> Pixels:
    name = _format_of(content)
    if name == "PNG" and max(struct.unpack(">II", content[16:24].ljust(8, b"\0"))) > MAX_SIDE:
        raise ImageNotDecodable("a damaged header")
    try:
        with Image.open(io.BytesIO(content), formats=[name]) as opened:
            _check_size(*opened.size)
            _check_proportion(opened.width * opened.height, PIXELS_PER_BYTE[name] * len(content))
            if name != "JPEG" and getattr(opened, "is_animated", False):  # phones add previews to a JPEG; it is still
                raise ImageFormatNotPermitted("animated")
            if name == "PNG":
                _check_chunks(content)
            opened.load()
            if name == "PNG":
                _rescale_key(opened, depth=content[24])
            srgb = managed(opened.info.get("icc_profile"), opened.mode)
            return _flatten(_upright(opened), background, srgb)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, struct.error, zlib.error, OverflowError) as exc:
        raise ImageNotDecodable(f"{name}: {type(exc).__name__}") from exc
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as exc:
        raise ImageTooManyPixels(type(exc).__name__) from exc


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
        picture.save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()


def encode_mask(mask: Pixels) -> bytes:
    """A grey PNG file with the pixels of an HW uint8 mask."""
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG", compress_level=6)
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


def _check_proportion(pixels: int, most_for_its_bytes: int) -> None:
    """Refuses a header that claims more than its bytes can hold, and a picture that is large and nothing else."""
    if pixels > max(FREE_PIXELS, most_for_its_bytes):
        raise ImageTooManyPixels(f"{pixels} pixels, where the bytes hold {most_for_its_bytes}")


def _check_chunks(content: bytes) -> None:
    """Refuses a PNG whose checksums are wrong, or whose end, palette or rows are missing, all of which Pillow bears."""
    at, kind, kinds, missing = len(PNG_SIGNATURE), b"", set(), _bytes_of_rows(content)
    inflate = zlib.decompressobj()
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", content, at)
        (checksum,) = struct.unpack_from(">I", content, at + 8 + length)
        if checksum != zlib.crc32(content[at + 4 : at + 8 + length]):
            raise ImageNotDecodable("a chunk's checksum is wrong")
        kinds.add(kind)
        if kind == b"IDAT":
            for piece in range(at + 8, at + 8 + length, PIECE_BYTES):
                if missing > 0:
                    missing -= len(inflate.decompress(content[piece : min(piece + PIECE_BYTES, at + 8 + length)]))
        at += 12 + length
    if missing > 0:
        raise ImageNotDecodable("rows are missing")
    if content[25] == PALETTE and b"PLTE" not in kinds:
        raise ImageNotDecodable("the palette is missing")


def _bytes_of_rows(content: bytes) -> int:
    """How many bytes a PNG's header says that there are to be inflated: each row, and its filter before it."""
    width, height, depth, colour_type, _, _, interlaced = struct.unpack_from(">IIBBBBB", content, 16)
    bits = depth * PNG_CHANNELS.get(colour_type, 1)
    passes = [(width, height)]
    if interlaced:
        passes = [(-(-(width - x) // across), -(-(height - y) // down)) for x, y, across, down in ADAM7]
    return sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in passes)


def _upright(picture: Image.Image) -> Image.Image:
    """The picture turned as its EXIF says; Pillow's `exif_transpose` also writes EXIF, which fails on damaged tags."""
    turn = UPRIGHT.get(picture.getexif().get(ORIENTATION, 1))
    return picture if turn is None else picture.transpose(turn)


def _rescale_key(picture: Image.Image, depth: int) -> None:
    """Brings a PNG's transparent colour to 8 bits, as Pillow brought the samples but not their key."""
    key = picture.info.get("transparency")
    if isinstance(key, int) and picture.mode in ("1", "L"):
        highest = 2**depth - 1
        picture.info["transparency"] = (key & highest) * 255 // highest
    elif isinstance(key, tuple) and depth == 16:
        picture.info["transparency"] = tuple(level >> 8 for level in key)


def _flatten(picture: Image.Image, background: int, srgb: ToSRGB) -> Pixels:
    """RGB of any mode, what is transparent on the background."""
    pixels = np.empty((picture.height, picture.width, 3), np.uint8)
    for top in range(0, picture.height, BAND_ROWS):
        bottom = min(top + BAND_ROWS, picture.height)
        pixels[top:bottom] = _rgb(picture.crop((0, top, picture.width, bottom)), background, srgb)
    return pixels


def _rgb(picture: Image.Image, background: int, srgb: ToSRGB) -> Pixels:
    if picture.mode.startswith("I"):  # 16-bit grey is scaled, not clipped
        deep = np.asarray(picture)
        grey = ((deep.astype(np.uint32) + 128) // 257).astype(np.uint8)
        grey[deep == picture.info.get("transparency", -1)] = background
        return np.repeat(grey[..., None], 3, axis=2)
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        alpha = layer.getchannel("A")
        layer = srgb(layer).convert("RGBA")
        layer.putalpha(alpha)
        canvas = Image.new("RGBA", layer.size, (background, background, background, 255))
        canvas.alpha_composite(layer)
        return np.asarray(canvas.convert("RGB"))
    return np.asarray(srgb(picture).convert("RGB"))
