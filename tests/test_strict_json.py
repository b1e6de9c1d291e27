from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from container.errors import InvalidJson
from container.strict_json import loads

NOT_JSON = {
    "empty": b"",
    "cut": b'{"person_image_url":',
    "two values": b"{} {}",
    "byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "no UTF-8": b'{"a": "\xff"}',
    "overlong UTF-8": b'{"a": "\xc0\xaf"}',
    "duplicate key": b'{"a": 1, "a": 2}',
    "duplicate key below": b'[{"a": {"b": 1, "b": 1}}]',
    "duplicate key by escape": b'{"a": 1, "\\u0061": 2}',
    "NaN": b'{"a": NaN}',
    "Infinity": b"[Infinity]",
    "-Infinity": b"-Infinity",
    "too deep": b"[" * 60_000 + b"]" * 60_000,
    "objects too deep": b'{"a":' * 20_000,
    "a number of 5,000 digits": b"1" * 5_000,
    "trailing comma": b"[1,]",
    "comment": b"{} // x",
    "single quotes": b"{'a': 1}",
    "raw newline in a string": b'"a\nb"',
    "leading zero": b"01",
}
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    scalars | st.text(), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
def test_what_rfc_8259_does_not_allow_is_invalid_json(body):
    with pytest.raises(InvalidJson):
        loads(body)


def test_the_detail_names_the_kind_of_error_and_quotes_nothing():
    with pytest.raises(InvalidJson) as caught:
        loads(b'{"secret": "s3cr3t", }')
    assert str(caught.value) == "JSONDecodeError"


@pytest.mark.parametrize(("body", "value"), [(b"null", None), (b"[]", []), (b'"x"', "x"), (b"7", 7)])
def test_a_value_that_is_no_object_is_still_json(body, value):
    assert loads(body) == value


@given(values)
@settings(deadline=None)
def test_every_json_value_comes_back_as_it_was_written(value):
    assert loads(json.dumps(value, ensure_ascii=False).encode()) == value


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_random_bytes_are_a_value_or_invalid_json(body):
    with contextlib.suppress(InvalidJson):
        loads(body)
