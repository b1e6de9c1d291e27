"""ICC profiles of displays, of greys and of inks, made here; Pillow writes none but that of sRGB."""

from __future__ import annotations

import struct

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
# Primaries of Display P3, adapted to D50 (columns of Apple's published matrix).
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def _fixed(values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _xyz(values):
    return b"XYZ \0\0\0\0" + _fixed(values)


def _profile(space, connection, kind, tags):
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78,
        b"cprt": b"text\0\0\0\0x\0",
    } | tags
    at, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", at + len(data), len(content))
        data += content + b"\0" * (-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", at + len(data), b"lcms", 0x02000000, kind, space, connection)
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + _fixed(D50) + b"\0" * 48
    return head + struct.pack(">I", len(tags)) + table + data


def display_p3():
    """The profile of an iPhone's photos."""
    curve = b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + _fixed(SRGB_CURVE)
    colours = {name: _xyz(primary) for name, primary in zip((b"rXYZ", b"gXYZ", b"bXYZ"), P3)}
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    return _profile(b"RGB ", b"XYZ ", b"mntr", {b"wtpt": _xyz(D50), **colours, **curves})


def linear_grey():
    """A profile of greys whose levels are amounts of light."""
    curve = b"curv\0\0\0\0" + struct.pack(">I", 0)
    return _profile(b"GRAY", b"XYZ ", b"mntr", {b"wtpt": _xyz(D50), b"kTRC": curve})


def inks_that_print_white():
    """A profile of four inks, none of which shows on paper."""
    white = struct.pack(">3H", 0xFF00, 0x8000, 0x8000)  # L*a*b* of 100, 0, 0
    table = b"mft2\0\0\0\0" + bytes((4, 3, 2, 0)) + _fixed(np.eye(3).ravel()) + struct.pack(">HH", 2, 2)
    table += struct.pack(">2H", 0, 0xFFFF) * 4 + white * 16 + struct.pack(">2H", 0, 0xFFFF) * 3
    return _profile(b"CMYK", b"Lab ", b"prtr", {b"wtpt": _xyz(D50), b"A2B0": table})
