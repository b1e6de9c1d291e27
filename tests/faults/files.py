"""Image files that no photo app writes: foreign formats, damaged PNGs, bombs, animations."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

import cv2
import numpy as np
from PIL import Image as Pillow
from PIL import PngImagePlugin, features

from .pictures import Pixels, file_of, ramp

SIGNATURE = b"\x89PNG\r\n\x1a\n"
XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF/></x:xmpmeta>"
GPS_IFD, MAKE, ORIENTATION = 0x8825, 0x010F, 0x0112  # EXIF tags


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and has a few pixels at most."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def png_bomb(side: int) -> bytes:
    """A PNG that really holds so many black pixels, one bit each, in few bytes."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    squeeze = zlib.compressobj(1)
    line = b"\0" * (1 + (side + 7) // 8)
    pixels = b"".join(squeeze.compress(line) for _ in range(side)) + squeeze.flush()
    return SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def without_chunk(content: bytes, kind: bytes) -> bytes:
    """The PNG without its chunks of a kind."""
    at, kept = len(SIGNATURE), [SIGNATURE]
    while at < len(content):
        (length,) = struct.unpack_from(">I", content, at)
        if content[at + 4 : at + 8] != kind:
            kept.append(content[at : at + 12 + length])
        at += 12 + length
    return b"".join(kept)


def damaged_pngs() -> dict[str, bytes]:
    """What is wrong -> the file."""
    good = file_of(ramp())
    data = good.index(b"IDAT")
    (length,) = struct.unpack_from(">I", good, data - 4)
    spoilt = bytearray(good)
    spoilt[data + 4 + length] ^= 0xFF  # the first byte of the checksum
    return {
        "bad CRC": bytes(spoilt),
        "IHDR 0x0": png_header(0, 0),
        "IHDR 2^31-1": png_header(2**31 - 1, 2**31 - 1),
        "no IDAT": without_chunk(good, b"IDAT"),
        "no IEND": without_chunk(good, b"IEND"),
    }


def no_images() -> dict[str, bytes]:
    """What it is -> the file."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("person.jpg", b"no picture")
    return {
        "0 bytes": b"",
        "3 bytes": b"\xff\xd8\xff",
        "HTML": b"<!doctype html><html><body><img src='a.png'></body></html>",
        "PDF": b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n%%EOF\n",
        "ZIP": archive.getvalue(),
    }


def foreign_formats() -> dict[str, bytes]:
    """The format -> a file of it; those that this Pillow can write are whole, the others have a true beginning."""
    picture = Pillow.fromarray(ramp(96, 96))
    written = {name: file_of(picture, name) for name in ("GIF", "BMP", "TIFF", "ICO", "EPS")}
    if features.check("jpg_2000"):
        written["JPEG2000"] = file_of(picture, "JPEG2000")
    if features.check("avif"):
        written["AVIF"] = file_of(picture, "AVIF")
    empty = b"\0" * 200
    return {
        "AVIF": b"\x00\x00\x00\x20ftypavif" + empty,
        "JPEG2000": b"\x00\x00\x00\x0cjP  \r\n\x87\n" + empty,
        "SVG": b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg' width='96' height='96'/>",
        "PSD": b"8BPS\x00\x01" + b"\0" * 6 + struct.pack(">HIIHH", 3, 96, 96, 8, 3) + empty,
        "HEIC": b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00heicmif1" + empty,
        **written,
    }


def animations() -> dict[str, bytes]:
    """What it is -> the file."""

    def webp(count: int) -> bytes:
        colours = [(number * 37 % 256, number * 91 % 256, number % 256) for number in range(count)]
        frames = [Pillow.new("RGB", (96, 96), colour) for colour in colours]
        return file_of(frames[0], "WEBP", save_all=True, append_images=frames[1:], quality=1)

    frames = [Pillow.new("RGB", (96, 96), (number * 60, 0, 0)) for number in range(4)]
    return {
        "WebP of 4 frames": webp(4),
        "APNG": file_of(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "WebP of 500 frames": webp(500),
    }


def deep_png(picture: Pixels) -> bytes:
    """A 16-bit PNG of HWC RGB or HW grey uint8 pixels."""
    deep = picture.astype(np.uint16) * 257
    written, content = cv2.imencode(".png", deep[..., ::-1] if deep.ndim == 3 else deep)
    if not written:
        raise ValueError("OpenCV did not write the PNG")
    return bytes(content)


def with_metadata(picture: Pixels) -> bytes:
    """A JPEG with GPS in its EXIF, with XMP, a colour profile and a comment."""
    made, exif = Pillow.fromarray(picture), Pillow.Exif()
    exif[MAKE] = "SecretPhone"
    exif.get_ifd(GPS_IFD).update({1: "N", 2: (48.0, 8.0, 14.0), 3: "E", 4: (11.0, 34.0, 31.0)})
    return file_of(made, "JPEG", quality=95, exif=exif, xmp=XMP, icc_profile=b"profile" * 30, comment=b"a comment")


def png_with_text(picture: Pixels) -> bytes:
    """A PNG with texts beside its pixels."""
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Author", "SecretPhone")
    return file_of(picture, "PNG", pnginfo=texts)
