from __future__ import annotations

import contextlib
import io
import resource
import struct
import time
import warnings
import zlib
from threading import Event, Thread

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from icc import display_p3, inks_that_print_white, linear_grey
from PIL import Image, ImageCms, ImageFile, PngImagePlugin, WebPImagePlugin

from container import images
from container.errors import (
    ImageFormatNotPermitted,
    ImageNotDecodable,
    ImageTooManyPixels,
    ImageTooSmall,
    Refusal,
)
from container.images import BAND_ROWS, FILE_OF, decode, decode_mask, encode

PNG = b"\x89PNG\r\n\x1a\n"
DAMAGED_EXIF = pytest.mark.filterwarnings("ignore::UserWarning")  # what Pillow says of it


def gradient(width=96, height=80):
    """HWC uint8: red falls to the right, green downwards; no two corners are alike."""
    red, green = np.meshgrid(np.linspace(250, 10, width), np.linspace(240, 20, height))
    return np.dstack([red, green, np.full_like(red, 90)]).round().astype(np.uint8)


def noise(width, height):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def file_of(picture, file_format, **options):
    file = io.BytesIO()
    picture.save(file, file_format, **options)
    return file.getvalue()


def photo(file_format="JPEG", **options):
    return file_of(Image.fromarray(gradient()), file_format, **options)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_claiming(width, height, rows=b"\x00" * 300):
    """A PNG whose header claims a size; there is next to nothing behind it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return PNG + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_of_16_bit_rgb(pixels):
    """A 16-bit RGB PNG of uint16 pixels; Pillow does not write them."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return PNG + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_of(samples, depth, transparent):
    """A PNG of grey (HW) or RGB (HWC) samples of 1 to 16 bits, one level or colour of which is transparent."""
    colour_type, height, width = (0 if samples.ndim == 2 else 2), *samples.shape[:2]
    bits = np.unpackbits(samples.astype(">u2").view(np.uint8).reshape(height, -1, 2), axis=2)[..., 16 - depth :]
    rows = b"".join(b"\x00" + np.packbits(row).tobytes() for row in bits)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    key = np.atleast_1d(transparent).astype(">u2").tobytes()
    return (
        PNG + chunk(b"IHDR", header) + chunk(b"tRNS", key) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def plain_webp(width, height):
    """A lossless WebP of one colour: 38 bytes, whatever its size, which lies in two fields of 14 bits."""
    content = bytearray(file_of(Image.new("RGB", (64, 64), (9, 99, 199)), "WEBP", lossless=True, method=0))
    at = content.index(b"VP8L") + 9
    (fields,) = struct.unpack_from("<I", content, at)
    struct.pack_into("<I", content, at, fields & ~(2**28 - 1) | (height - 1) << 14 | (width - 1))
    return bytes(content)


def jpeg_claiming(width, height):
    """A JPEG whose header claims a size; the decoder would fill what is missing with grey."""
    content = bytearray(file_of(Image.new("RGB", (64, 64)), "JPEG"))
    at = content.index(b"\xff\xc0") + 5
    struct.pack_into(">HH", content, at, height, width)
    return bytes(content)


def chunks_of(content):
    """Start, kind and length of the content of every chunk of a PNG."""
    at = len(PNG)
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        yield at, content[at + 4 : at + 8], length
        at += 12 + length


def without_chunk(content, kind):
    kept = [content[at : at + 12 + length] for at, found, length in chunks_of(content) if found != kind]
    return PNG + b"".join(kept)


def with_wrong_checksum(content, kind):
    at, length = next((at, length) for at, found, length in chunks_of(content) if found == kind)
    damaged = bytearray(content)
    damaged[at + 8 + length] ^= 1
    return bytes(damaged)


def with_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def psnr(one, other):
    error = np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2)
    return 10 * np.log10(255**2 / error) if error else np.inf


# --- formats


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_a_lossless_file_gives_its_pixels(file_format):
    assert np.array_equal(decode(photo(file_format, lossless=True)), gradient())


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"keep_rgb": True}])
def test_a_jpeg_gives_its_pixels_up_to_codec_noise(options):
    assert psnr(decode(photo(quality=95, **options)), gradient()) > 35


def test_what_decode_returns_is_rows_of_rgb_bytes():
    pixels = decode(photo())
    assert (pixels.shape, pixels.dtype) == ((80, 96, 3), np.uint8)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xd8\xff",
        b"abc",
        b"<!doctype html><html><body>not found</body></html>",
        b"%PDF-1.7\n" + b"\x00" * 100,
        b"PK\x03\x04" + b"\x00" * 100,
        b"RIFF\x00\x00\x00\x00WAVEfmt ",
        b"RIFF\x00\x00\x00\x00WEBP",
        b"RIFF\x00\x00\x00\x00WEBPVP8X" + b"\x00" * 40,
        PNG,
        PNG + b"\x00" * 100,
    ],
    ids=["empty", "3 bytes", "text", "HTML", "PDF", "ZIP", "WAV", "RIFF", "bare WebP", "bare PNG", "zeros PNG"],
)
def test_what_is_no_image_is_not_decodable(content):
    with pytest.raises(ImageNotDecodable) as caught:
        decode(content)
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize("file_format", ["GIF", "BMP", "TIFF", "EPS", "ICO", "JPEG2000", "PPM", "TGA", "AVIF"])
def test_the_parser_of_another_format_never_runs(file_format, monkeypatch):
    content = file_of(Image.fromarray(gradient(64, 64)), file_format)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises((ImageFormatNotPermitted, ImageNotDecodable)):
        decode(content)


@pytest.mark.parametrize(
    "content",
    [
        b"GIF89a",
        b"BM\x36\x00",
        b"II*\x00",
        b"MM\x00*",
        b"8BPS\x00\x01",
        b"\x00\x00\x01\x00\x01\x00",
        b"%!PS-Adobe-3.0 EPSF-3.0",
        b"\x00\x00\x00\x0cjP  \r\n\x87\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\n  <SVG>",
        b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00",
        b"\x00\x00\x00\x1cftypavif\x00\x00\x00\x00",
    ],
)
def test_a_known_other_format_is_named_as_such(content):
    with pytest.raises(ImageFormatNotPermitted):
        decode(content)


# --- damage


@pytest.mark.parametrize(
    "content",
    [
        photo("JPEG"),
        photo("JPEG", progressive=True),
        photo("PNG"),
        photo("WEBP"),
        photo("WEBP", lossless=True),
    ],
    ids=["JPEG", "progressive JPEG", "PNG", "WebP", "lossless WebP"],
)
@pytest.mark.parametrize("kept", [0.8, 0.5, 0.1])
def test_a_truncated_file_is_not_decodable(content, kept):
    with pytest.raises(ImageNotDecodable):
        decode(content[: int(len(content) * kept)])


def test_pillow_is_not_told_to_make_up_missing_parts():
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize(
    "content",
    [
        with_wrong_checksum(photo("PNG"), b"IHDR"),
        with_wrong_checksum(photo("PNG"), b"IDAT"),
        with_wrong_checksum(photo("PNG"), b"IEND"),
        without_chunk(photo("PNG"), b"IHDR"),
        without_chunk(photo("PNG"), b"IDAT"),
        without_chunk(photo("PNG"), b"IEND"),
        png_claiming(0, 0),
        png_claiming(0, 100),
        png_claiming(100, 100),
    ],
    ids=[
        "IHDR checksum",
        "IDAT checksum",
        "IEND checksum",
        "no IHDR",
        "no IDAT",
        "no IEND",
        "0x0",
        "0x100",
        "too few rows",
    ],
)
def test_a_damaged_png_is_not_decodable(content):
    with pytest.raises(ImageNotDecodable):
        decode(content)


def interlaced(pixels):
    """A PNG of HWC uint8 RGB in the seven passes of Adam7; Pillow does not write them."""
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = [b"\x00" + row.tobytes() for x, y, across, down in passes for row in pixels[y::down, x::across]]
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 2, 0, 0, 1)
    return PNG + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")


def with_fewer_rows(content, missing_bytes):
    """The PNG with its last bytes of rows left out, and everything else as it should be."""
    of_rows = b"".join(content[at + 8 : at + 8 + length] for at, kind, length in chunks_of(content) if kind == b"IDAT")
    kept = zlib.compress(zlib.decompress(of_rows)[:-missing_bytes])
    header = content[: 8 + 25]
    palette = [content[at : at + 12 + length] for at, kind, length in chunks_of(content) if kind == b"PLTE"]
    return header + b"".join(palette) + chunk(b"IDAT", kept) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
def test_a_png_whose_last_row_is_missing_is_not_decodable(mode):
    stored = Image.fromarray(gradient()).convert("I" if mode == "I;16" else mode)
    content = file_of(stored.convert("I;16") if mode == "I;16" else stored, "PNG")
    decode(content)
    with pytest.raises(ImageNotDecodable, match="rows"):
        decode(with_fewer_rows(content, 1))


@pytest.mark.parametrize("size", [(64, 64), (65, 67), (71, 80)])
def test_an_interlaced_png_is_read_and_needs_all_its_rows(size):
    content = interlaced(gradient(*size))
    assert np.array_equal(decode(content), gradient(*size))
    with pytest.raises(ImageNotDecodable, match="rows"):
        decode(with_fewer_rows(content, 1))


def test_a_png_of_many_pieces_is_read():
    picture = Image.fromarray(noise(300, 200))
    of_rows = b"".join(b"\x00" + row.tobytes() for row in noise(300, 200))
    deflated = zlib.compress(of_rows)
    pieces = b"".join(chunk(b"IDAT", deflated[at : at + 1000]) for at in range(0, len(deflated), 1000))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 300, 200, 8, 2, 0, 0, 0))
    assert np.array_equal(decode(PNG + header + pieces + chunk(b"IEND", b"")), np.asarray(picture))


def test_a_png_without_the_palette_that_its_pixels_name_is_not_decodable():
    content = file_of(Image.fromarray(gradient()).convert("P"), "PNG")
    with pytest.raises(ImageNotDecodable, match="palette"):
        decode(without_chunk(content, b"PLTE"))


def test_a_png_that_claims_sides_of_2_to_the_31_is_damaged():
    with pytest.raises(ImageNotDecodable):
        decode(png_claiming(2**31 - 1, 2**31 - 1))


# --- sizes


@pytest.mark.parametrize(
    "size",
    [
        (50_000, 50_000),
        (13_000, 13_000),
        (7_072, 7_072),
        (1_000_000, 51),
        (20_000, 2_501),
        (7_000, 7_000),
        (4_001, 4_000),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_by_its_header_alone(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    with pytest.raises(ImageTooManyPixels):
        decode(png_claiming(*size))
    assert time.process_time() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000  # KiB


def test_a_bomb_is_refused_where_warnings_are_errors_too():
    with pytest.raises(ImageTooManyPixels):
        decode(png_claiming(13_000, 13_000))


@pytest.mark.parametrize("claiming", [plain_webp, jpeg_claiming])
def test_more_pixels_than_the_bytes_can_hold_are_refused_by_the_header(claiming):
    with pytest.raises(ImageTooManyPixels):
        decode(claiming(7_000, 7_000))


def test_a_plain_picture_as_large_as_a_phones_photo_is_no_bomb():
    assert (decode(plain_webp(4_000, 4_000)) == (9, 99, 199)).all()


def test_a_plain_webp_as_it_is_usually_written_is_no_bomb_at_any_size():
    content = file_of(Image.new("RGB", (4_000, 4_100), (9, 99, 199)), "WEBP", lossless=True)
    assert 16.4e6 / len(content) > 20_000
    assert decode(content).shape == (4_100, 4_000, 3)


def test_deflate_at_its_best_is_no_bomb():
    """One bit a pixel, all the same: no complete PNG has more pixels for its bytes."""
    content = file_of(Image.new("1", (4_000, 4_100)), "PNG", optimize=True)
    assert 16.4e6 / len(content) > 2_500
    assert decode(content).shape == (4_100, 4_000, 3)


@pytest.mark.parametrize(
    "size", [(1, 1), (2, 2), (63, 64), (64, 63), (1, 20_000), (20_000, 64), (64, 513), (513, 64)], ids=str
)
def test_a_picture_that_is_too_small_or_too_long_is_refused(size):
    with pytest.raises(ImageTooSmall):
        decode(file_of(Image.new("RGB", size), "PNG"))


@pytest.mark.parametrize("size", [(64, 64), (64, 512), (512, 64), (65, 519)], ids=str)
def test_the_smallest_side_and_the_longest_shape_are_permitted(size):
    assert decode(file_of(Image.new("RGB", size), "PNG")).shape == (size[1], size[0], 3)


def test_the_size_is_checked_before_the_pixels_are_read(monkeypatch):
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", None)
    with pytest.raises(ImageTooSmall):
        decode(file_of(Image.new("RGB", (63, 64)), "PNG"))


# --- orientation

UNDO = {  # how a camera that held `gradient` so would store it
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright.transpose(1, 0, 2), 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", UNDO)
@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_a_lossless_photo_is_turned_upright_to_the_pixel(orientation, file_format):
    stored = Image.fromarray(np.ascontiguousarray(UNDO[orientation](gradient())))
    content = file_of(stored, file_format, lossless=True, exif=with_exif_orientation(orientation))
    assert np.array_equal(decode(content), gradient())


@pytest.mark.parametrize("orientation", UNDO)
def test_a_jpeg_photo_is_turned_upright(orientation):
    stored = Image.fromarray(np.ascontiguousarray(UNDO[orientation](gradient())))
    content = file_of(stored, "JPEG", quality=95, exif=with_exif_orientation(orientation))
    assert psnr(decode(content), gradient()) > 35


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_an_orientation_that_does_not_exist_leaves_the_picture_as_it_is(orientation):
    content = photo("PNG", exif=with_exif_orientation(orientation))
    assert np.array_equal(decode(content), gradient())


@DAMAGED_EXIF
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\x00\x00",
        b"Exif\x00\x00II*\x00\xff\xff\xff\xff",
        b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff",
        # an orientation beside a tag of a type that its value does not have
        b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x02\x00"
        b"\x12\x01\x03\x00\x01\x00\x00\x00\x01\x00\x00\x00"
        b"\x0e\x01\x05\x00\x01\x00\x00\x00\x00\x00\x00\x00"
        b"\x00\x00\x00\x00",
    ],
)
def test_damaged_exif_alone_spoils_no_picture(exif):
    assert np.array_equal(decode(photo("PNG", exif=exif)), gradient())


def test_exif_that_cannot_be_written_again_spoils_no_picture():
    """Pillow's exif_transpose writes what it read; of a latitude's letter that is three fractions it cannot."""
    entry, end = struct.Struct(">HHII"), b"\x00" * 4
    gps_at, fractions_at = 8 + 2 + 2 * entry.size + 4, 8 + 2 + 2 * entry.size + 4 + 2 + entry.size + 4
    first = b"\x00\x02" + entry.pack(0x0112, 3, 1, 6 << 16) + entry.pack(0x8825, 4, 1, gps_at) + end
    gps = b"\x00\x01" + entry.pack(1, 5, 3, fractions_at) + end
    exif = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08" + first + gps + struct.pack(">6I", 1, 1, 2, 1, 3, 1)
    assert decode(photo("JPEG", exif=exif)).shape == (96, 80, 3)


# --- tones and transparency


def test_sixteen_bit_grey_keeps_its_tones():
    grey = np.linspace(0, 65_535, 96 * 80).reshape(80, 96).astype(np.uint16)
    pixels = decode(file_of(Image.fromarray(grey), "PNG"))
    assert np.abs(pixels.astype(int) - (grey / 257.0).round()[..., None]).max() == 0


def test_sixteen_bit_rgb_keeps_its_tones():
    deep = gradient().astype(np.uint16) * 257
    assert np.abs(decode(png_of_16_bit_rgb(deep)).astype(int) - gradient()).max() <= 1


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_a_picture_of_few_colours_becomes_rgb(mode):
    stored = Image.fromarray(gradient()).convert(mode)
    assert np.array_equal(decode(file_of(stored, "PNG")), np.asarray(stored.convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_grey_or_cmyk_jpeg_becomes_rgb(mode):
    stored = Image.fromarray(gradient()).convert(mode)
    assert psnr(decode(file_of(stored, "JPEG", quality=95)), np.asarray(stored.convert("RGB"))) > 30


@pytest.mark.parametrize("marked", [True, False])
def test_the_ink_of_a_cmyk_jpeg_is_stored_inverted_as_adobe_does(marked):
    """Whether Adobe's mark is there or not, as in browsers: no program writes it otherwise."""
    stored = Image.new("CMYK", (64, 64), (255, 0, 0, 0))
    content = file_of(stored, "JPEG", quality=95)
    at = content.index(b"\xff\xee")
    if not marked:
        (length,) = struct.unpack_from(">H", content, at + 2)
        content = content[:at] + content[at + 2 + length :]
    assert np.abs(decode(content)[32, 32].astype(int) - (0, 255, 255)).max() <= 4


def test_a_ycck_jpeg_has_the_colours_of_its_cmyk():
    stored = Image.fromarray(gradient()).convert("CMYK")
    plates = np.ascontiguousarray(np.asarray(stored)[..., :3])
    ycc = np.asarray(Image.fromarray(plates).convert("YCbCr"))
    ycck = Image.frombytes("CMYK", stored.size, np.dstack([255 - ycc, np.asarray(stored)[..., 3]]).tobytes())
    content = bytearray(file_of(ycck, "JPEG", quality=95))
    content[content.index(b"Adobe") + 11] = 2  # its transform: YCCK
    assert psnr(decode(bytes(content)), np.asarray(stored.convert("RGB"))) > 30


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_what_is_fully_transparent_is_white(file_format):
    stored = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert (decode(file_of(stored, file_format, lossless=True, exact=True)) == 255).all()


def test_a_soft_edge_is_blended_with_white():
    stored = Image.new("RGBA", (64, 64), (200, 0, 0, 128))
    expected = np.array([200, 0, 0]) * (128 / 255) + 255 * (127 / 255)
    assert np.abs(decode(file_of(stored, "PNG"))[0, 0] - expected).max() <= 1


@pytest.mark.parametrize(
    ("mode", "colour", "transparency"),
    [("LA", (90, 0), None), ("L", 7, 7), ("RGB", (1, 2, 3), (1, 2, 3)), ("P", 0, 0), ("P", 0, b"\x00"), ("1", 0, 0)],
)
def test_every_kind_of_transparency_is_composited_on_white(mode, colour, transparency):
    stored = Image.new(mode, (64, 64), colour)
    options = {} if transparency is None else {"transparency": transparency}
    assert decode(file_of(stored, "PNG", **options))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("depth", "key"),
    [(1, 0), (1, 1), (2, 0), (2, 3), (2, 1), (4, 15), (4, 5), (8, 85), (16, 0), (16, 65_535), (16, 700)],
)
def test_a_transparent_level_of_grey_is_white_whatever_its_depth(depth, key):
    samples = np.full((64, 80), 2**depth - 1 - key if depth == 1 else 2**depth // 3 + 1)
    samples[:32] = key
    pixels = decode(png_of(samples, depth, key), background=77)
    expected = round((2**depth // 3 + 1) * 255 / (2**depth - 1)) if depth > 1 else 255 * (1 - key)
    assert (pixels[:32] == 77).all()
    assert np.abs(pixels[32:].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour_is_white_whatever_its_depth(depth):
    highest = 2**depth - 1
    samples = np.zeros((64, 80, 3), int)
    samples[:32] = key = (highest, highest // 5, highest // 3)
    pixels = decode(png_of(samples, depth, key))
    assert (pixels[:32] == 255).all()
    assert (pixels[32:] == 0).all()


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGB", "RGBA", "LA", "I;16"])
def test_a_picture_of_several_bands_is_converted_without_a_seam(mode):
    grey = np.random.default_rng(0).integers(0, 256, (2 * BAND_ROWS + 70, 80), dtype=np.uint8)
    layers = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(grey[::-1])])
    stored = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else layers.convert(mode)
    canvas = Image.new("RGBA", stored.size, "white")
    canvas.alpha_composite((Image.fromarray(grey) if mode == "I;16" else stored).convert("RGBA"))
    assert np.array_equal(decode(file_of(stored, "PNG")), np.asarray(canvas.convert("RGB")))


def test_transparency_survives_being_turned_upright():
    stored = Image.new("P", (64, 80), 0)
    content = file_of(stored, "PNG", transparency=0, exif=with_exif_orientation(6))
    assert (decode(content) == 255).all()


# --- colours


def as_display_p3(picture):
    """What a phone stores of an sRGB picture."""
    return ImageCms.profileToProfile(
        picture, ImageCms.createProfile("sRGB"), ImageCms.ImageCmsProfile(io.BytesIO(display_p3()))
    )


@pytest.mark.parametrize(
    ("file_format", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 100, "subsampling": 0})],
)
def test_a_phones_colours_are_brought_to_srgb(file_format, options):
    seen = Image.fromarray(gradient())
    stored = as_display_p3(seen)
    assert psnr(np.asarray(stored), np.asarray(seen)) < 30
    pixels = decode(file_of(stored, file_format, icc_profile=display_p3(), **options))
    assert psnr(pixels, np.asarray(seen)) > (40 if file_format == "JPEG" else 48)


def test_the_colours_under_transparency_are_brought_to_srgb_and_the_background_is_not():
    stored = as_display_p3(Image.fromarray(gradient())).convert("RGBA")
    stored.paste((9, 9, 9, 0), (0, 0, 48, 80))
    pixels = decode(file_of(stored, "PNG", icc_profile=display_p3()))
    assert (pixels[:, :48] == 255).all()
    assert psnr(pixels[:, 48:], gradient()[:, 48:]) > 48


def test_a_palette_is_brought_to_srgb():
    stored = as_display_p3(Image.fromarray(gradient())).quantize(256)
    plain = decode(file_of(stored.convert("RGB"), "PNG", icc_profile=display_p3()))
    assert np.array_equal(decode(file_of(stored, "PNG", icc_profile=display_p3())), plain)


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_greys_are_brought_to_srgb(mode):
    stored = Image.new("L", (64, 64), 128).convert(mode)
    assert np.abs(decode(file_of(stored, "PNG", icc_profile=linear_grey()))[9, 9].astype(int) - 188).max() <= 1


def test_inks_are_brought_to_srgb_by_their_profile():
    stored = Image.new("CMYK", (64, 64), (255, 255, 0, 0))
    pixels = decode(file_of(stored, "JPEG", icc_profile=inks_that_print_white()))
    assert pixels.min() >= 254


@pytest.mark.parametrize(
    "profile",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        b"no profile",
        display_p3()[:300],
        linear_grey(),
        inks_that_print_white(),
        b"\xff" * 5000,
    ],
    ids=["sRGB", "words", "broken", "of greys", "of inks", "noise"],
)
def test_a_profile_that_says_nothing_of_the_picture_changes_nothing(profile):
    assert np.array_equal(decode(photo("PNG", icc_profile=profile)), gradient())


def test_the_levels_of_a_mask_are_what_is_stored_whatever_its_profile():
    mask = Image.fromarray(np.tile(np.arange(96, dtype=np.uint8), (80, 1)))
    assert np.array_equal(decode_mask(file_of(mask, "PNG", icc_profile=linear_grey())), np.asarray(mask))


def test_a_mask_has_one_grey_level_per_pixel():
    mask = np.tile(np.arange(96, dtype=np.uint8), (80, 1))
    assert np.array_equal(decode_mask(file_of(Image.fromarray(mask), "PNG")), mask)


def test_the_transparent_part_of_a_mask_is_black():
    stored = Image.new("LA", (64, 64), (255, 0))
    stored.paste((255, 255), (0, 0, 32, 64))
    mask = decode_mask(file_of(stored, "PNG"))
    assert ((mask[:, :32] == 255).all(), (mask[:, 32:] == 0).all()) == (True, True)


# --- moving pictures


def moving(file_format, frames):
    pictures = [Image.fromarray(np.full((64, 64, 3), 5 * (number % 50), np.uint8)) for number in range(frames)]
    return file_of(pictures[0], file_format, save_all=True, append_images=pictures[1:], duration=40)


@pytest.mark.parametrize(("file_format", "frames"), [("WEBP", 4), ("WEBP", 500), ("PNG", 4)])
def test_a_moving_picture_is_refused_before_its_frames_are_decoded(monkeypatch, file_format, frames):
    content, decoded = moving(file_format, frames), []
    for kind in (WebPImagePlugin.WebPImageFile, PngImagePlugin.PngImageFile):
        monkeypatch.setattr(kind, "load", decoded.append)
    with pytest.raises(ImageFormatNotPermitted):
        decode(content)
    assert decoded == []


def test_a_phones_jpeg_with_a_preview_behind_it_is_a_still_picture():
    content = photo("MPO", quality=95, save_all=True, append_images=[Image.new("RGB", (32, 32))])
    assert psnr(decode(content), gradient()) > 35


# --- encoding


@pytest.mark.parametrize("output_format", FILE_OF)
def test_what_encode_writes_is_of_the_format_and_size_asked_for(output_format):
    with Image.open(io.BytesIO(encode(gradient(), output_format, 95))) as written:
        assert (written.format.lower(), written.size, written.mode) == (output_format, (96, 80), "RGB")


@pytest.mark.parametrize("output_format", FILE_OF)
def test_a_picture_with_place_and_time_leaves_without_them(output_format):
    exif = with_exif_orientation(1)
    exif[0x010E] = "taken at home"
    exif.get_ifd(0x8825)[2] = (52.0, 31.0, 12.0)
    garment = photo(quality=95, exif=exif, xmp=b"<x:xmpmeta/>", icc_profile=b"profile", comment=b"remark")
    written = encode(decode(garment), output_format, 95)
    with Image.open(io.BytesIO(written)) as picture:
        metadata = set(picture.info) - {"jfif", "jfif_version", "jfif_unit", "jfif_density", "loop", "background"}
        assert metadata - {"timestamp", "duration"} == set()
        assert not picture.getexif()
    assert not any(trace in written for trace in (b"Exif", b"xmpmeta", b"ICC", b"remark", b"taken at home"))


def test_png_is_lossless():
    assert np.array_equal(decode(encode(noise(80, 70), "png", 1)), noise(80, 70))


@pytest.mark.parametrize("quality", [1, 50, 90, 95, 100])
@pytest.mark.parametrize("output_format", FILE_OF)
def test_the_hardest_picture_can_be_written_at_every_quality(output_format, quality):
    """Noise: Pillow's optimising JPEG writer gives up where a file is larger than it guessed."""
    assert decode(encode(noise(300, 400), output_format, quality)).shape == (400, 300, 3)


def test_jpeg_keeps_the_full_resolution_of_colour():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = (255, 0, 0)
    stripes[:, 1::2] = (0, 0, 255)
    assert psnr(decode(encode(stripes, "jpeg", 95)), stripes) > 30


def test_the_same_picture_gives_the_same_file():
    assert encode(gradient(), "jpeg", 95) == encode(gradient(), "jpeg", 95)


# --- the process around it


def test_decoding_leaves_the_warning_filters_of_the_process_alone(monkeypatch):
    """They belong to every thread: two decodes that set and restored them could leave "error" behind for all."""
    inside, leave = Event(), Event()

    def wait(width, height):
        inside.set()
        leave.wait(5)

    monkeypatch.setattr(images, "_check_size", wait)
    before = list(warnings.filters)
    thread = Thread(target=decode, args=(photo("PNG"),))
    thread.start()
    inside.wait(5)
    during = list(warnings.filters)
    leave.set()
    thread.join(5)
    assert during == before


REAL_FILES = [
    photo("JPEG", exif=with_exif_orientation(6), comment=b"remark"),
    photo("JPEG", progressive=True),
    photo("MPO", save_all=True, append_images=[Image.new("RGB", (32, 32))]),
    photo("PNG", exif=with_exif_orientation(5)),
    file_of(Image.fromarray(gradient()).convert("P"), "PNG", transparency=3),
    moving("PNG", 2),
    photo("WEBP", exif=with_exif_orientation(8)),
    file_of(Image.fromarray(gradient()).convert("RGBA"), "WEBP", lossless=True),
]


@given(st.sampled_from([b"", b"\xff\xd8\xff", PNG, b"RIFF\x00\x00\x00\x00WEBP"]), st.binary(max_size=300))
@settings(deadline=None, max_examples=200)
@DAMAGED_EXIF
def test_random_bytes_are_a_refusal(signature, content):
    with pytest.raises(Refusal):
        decode(signature + content)


@given(
    st.sampled_from(REAL_FILES),
    st.lists(st.tuples(st.integers(0, 1_000), st.integers(0, 255)), min_size=1, max_size=12),
    st.booleans(),
)
@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@DAMAGED_EXIF
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_real_file_with_wrong_bytes_is_a_picture_or_a_refusal(content, changes, checksums_fit):
    damaged = bytearray(content)
    for at, value in changes:
        damaged[at % len(damaged)] = value
    if checksums_fit and damaged.startswith(PNG):
        damaged = bytearray(with_right_checksums(bytes(damaged)))
    with contextlib.suppress(Refusal):
        decode(bytes(damaged))


def with_right_checksums(content):
    """As a thorough attacker would leave it; what lies behind an impossible length stays as it is."""
    mended, at = PNG, len(PNG)
    while at + 12 <= len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        if at + 12 + length > len(content):
            break
        mended += chunk(content[at + 4 : at + 8], content[at + 8 : at + 8 + length])
        at += 12 + length
    return mended + content[at:]
