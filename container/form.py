"""The names that forms have for a try-on: its pictures by what they show, whatever the cloth type makes of them."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from container.errors import ImageTooLarge, InvalidRequest, TryOnError
from container.fetch import MAX_BYTES
from container.request import TryOnRequest, parse_try_on, upload_reference

OTHER_NAMES = sorted(name for name in TryOnRequest.model_fields if name.endswith("_url"))  # of the same pictures
IMAGES = ("person_image", "cloth_image", "lower_cloth_image", "mask_image")
NAMES = {"person_image_url": "person_image", "mask_image_url": "mask_image"}  # a request's -> the form's, always
CALLER = {"userId": "rest", "timestamp": "upload"}  # where a form names none; nothing is stored under them
CLOTH_TYPE = "upper"  # where a form names none
MAX_BASE64 = 4 * -(-MAX_BYTES // 3)  # characters
LINE_ENDS = {ord(end): None for end in "\r\n"}  # which `base64` of the shell writes every 76 characters
DATA_URL = re.compile(r"data:[^,]{0,128};base64", re.IGNORECASE)  # what stands before its comma
REFERENCE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,15}://")


def try_on_of(form: Mapping[str, object]) -> TryOnRequest:
    """The request that the fields of a form make; its pictures are URLs or references to uploads.

    Raises:
        InvalidRequest: with the field of the form that is at fault.
    """
    fields = {**CALLER, "cloth_type": CLOTH_TYPE, **form}
    pictures = _pictures(fields)
    for name in OTHER_NAMES:
        if name in fields:
            raise InvalidRequest("beside the form's own names", field=name)
    others = {name: value for name, value in fields.items() if name not in IMAGES}
    with named_by_form(pictures):
        return parse_try_on({**others, **{place: fields.get(name) for place, name in pictures.items()}})


@contextmanager
def named_by_form(names: Mapping[str, str] = NAMES) -> Iterator[None]:
    """Inside the block, errors that name a field of the request name the form's instead."""
    try:
        yield
    except TryOnError as exc:
        if exc.field is not None:
            exc.field = names.get(exc.field, exc.field)
        raise


def with_uploads(form: Mapping[str, object]) -> tuple[dict[str, object], dict[str, bytes]]:
    """The form with a reference in the place of each picture that stands in it as base64, and the files by reference.

    Raises:
        InvalidRequest, ImageTooLarge: with the field of the form that is at fault.
    """
    fields, uploads = dict(form), {}
    for name in IMAGES:
        value = fields.get(name)
        if value is None or (isinstance(value, str) and REFERENCE.match(value)):
            continue
        content = _file(name, value)
        fields[name] = upload_reference(content)
        uploads[upload_reference(content)] = content
    return fields, uploads


def _file(name: str, value: object) -> bytes:
    """The file in base64, behind `data:...;base64,` or not."""
    if not isinstance(value, str):
        raise InvalidRequest("no text", field=name)
    head, encoded = "", value
    if value[:5].lower() == "data:":
        head, _, encoded = value.partition(",")
        if not DATA_URL.fullmatch(head):
            raise InvalidRequest("a data URL without base64", field=name)
    encoded = encoded.translate(LINE_ENDS)
    if len(encoded) > MAX_BASE64:
        raise ImageTooLarge(f"{len(encoded)} characters", field=name)
    try:
        content = base64.b64decode(encoded, validate=True)
    except ValueError as exc:
        raise InvalidRequest("neither a URL nor base64", field=name) from exc
    if not content:
        raise InvalidRequest("empty", field=name)
    return content


def _pictures(fields: Mapping[str, object]) -> dict[str, str]:
    """The names that a request has for the pictures -> those of the form."""
    for name in ("person_image", "cloth_image"):
        if fields.get(name) is None:
            raise InvalidRequest("missing", field=name)
    kind, lower = fields["cloth_type"], fields.get("lower_cloth_image")
    if lower is not None and kind != "overall":
        raise InvalidRequest("of no use for this type", field="lower_cloth_image")
    if kind == "lower":
        return {**NAMES, "lower_cloth_url": "cloth_image"}
    if kind == "overall" and lower is None:
        return {**NAMES, "overall_cloth_url": "cloth_image"}
    return {**NAMES, "upper_cloth_url": "cloth_image", "lower_cloth_url": "lower_cloth_image"}
