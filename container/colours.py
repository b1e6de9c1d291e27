"""The colours of a picture in sRGB, which the models have learnt, and which a file without a profile is taken for."""

from __future__ import annotations

import io
from typing import Callable

from PIL import Image, ImageCms

MODES = {  # a profile's colour space -> the modes of pictures that it speaks of, the first as lcms takes them
    "RGB": ("RGB", "RGBA", "P", "PA", "RGBa"),
    "GRAY": ("L", "LA", "1", "La"),
    "CMYK": ("CMYK",),
}
SRGB = "sRGB"  # stands in the description of every profile of it
UNREADABLE = (ImageCms.PyCMSError, OSError, ValueError, TypeError, OverflowError)

ToSRGB = Callable[[Image.Image], Image.Image]


def as_stored(picture: Image.Image) -> Image.Image:
    """The picture itself."""
    return picture


def to_srgb(profile: bytes | None, mode: str) -> ToSRGB:
    """What turns pictures with a profile into RGB ones in sRGB, colours that it has not to its nearest.

    Alpha is lost on the way. Where there is no profile, or none that can be read and speaks of such pictures, or it is
    that of sRGB, nothing is changed.

    Args:
        profile: of ICC, as it stands in the file.
        mode: Pillow's, of the picture in the file.
    """
    if not profile:
        return as_stored
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        modes = MODES.get(opened.profile.xcolor_space.strip(), ())
        if mode not in modes or SRGB in ImageCms.getProfileDescription(opened):
            return as_stored
        transform = ImageCms.buildTransform(
            opened,
            ImageCms.createProfile("sRGB"),
            modes[0],
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except UNREADABLE:
        return as_stored
    return lambda picture: transform.apply(picture.convert(modes[0]))
