"""The messages of AWS's event stream encoding, which botocore reads and does not write.

Source: the Smithy specification of `application/vnd.amazon.eventstream`.
"""

from __future__ import annotations

import json
import struct
from binascii import crc32
from collections.abc import Mapping

CONTENT_TYPE = "application/vnd.amazon.eventstream"
STRING = 7  # type of a header's value
MAX_PAYLOAD_BYTES = 256 * 1024  # of one message; readers must accept more, and need not


def payload_part(content: bytes) -> bytes:
    """A PayloadPart event with some bytes of an answer, at most `MAX_PAYLOAD_BYTES`."""
    names = {":message-type": "event", ":event-type": "PayloadPart", ":content-type": "application/octet-stream"}
    return _message(names, content)


def exception(kind: str, members: Mapping[str, str]) -> bytes:
    """An exception of a modelled type; nothing follows it in a stream."""
    names = {":message-type": "exception", ":exception-type": kind, ":content-type": "application/json"}
    return _message(names, json.dumps(members).encode())


def _message(headers: Mapping[str, str], payload: bytes) -> bytes:
    block = b"".join(_header(name.encode(), value.encode()) for name, value in headers.items())
    prelude = struct.pack(">II", 12 + len(block) + len(payload) + 4, len(block))
    message = prelude + struct.pack(">I", crc32(prelude)) + block + payload
    return message + struct.pack(">I", crc32(message))


def _header(name: bytes, value: bytes) -> bytes:
    return struct.pack(">B", len(name)) + name + struct.pack(">BH", STRING, len(value)) + value
