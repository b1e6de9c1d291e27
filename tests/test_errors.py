from __future__ import annotations

import re

import pytest

from container import errors
from container.errors import Outage, Refusal, TryOnError

STATUS_OF = {
    "invalid_json": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "request_timeout": 408,
    "job_conflict": 409,
    "request_too_large": 413,
    "unsupported_content_type": 415,
    "invalid_request": 422,
    "url_not_permitted": 422,
    "address_not_permitted": 422,
    "too_many_redirects": 422,
    "image_too_large": 422,
    "image_not_found": 422,
    "image_not_decodable": 422,
    "image_format_not_permitted": 422,
    "image_too_small": 422,
    "image_too_many_pixels": 422,
    "mask_invalid": 422,
    "person_not_found": 422,
    "overloaded": 429,
    "internal": 500,
    "generation_failed": 500,
    "image_source_failed": 502,
    "storage_failed": 502,
    "notify_failed": 502,
    "not_ready": 503,
    "draining": 503,
    "gpu_failed": 503,
    "image_source_timeout": 504,
    "deadline_exceeded": 504,
}
REFUSALS = Refusal.__subclasses__()
OUTAGES = Outage.__subclasses__()
ALL = REFUSALS + OUTAGES


def test_the_codes_and_statuses_are_the_published_ones():
    assert {error.code: error.status for error in ALL} == STATUS_OF


def test_no_two_errors_share_a_code():
    assert len({error.code for error in ALL}) == len(ALL)


def test_the_tree_in_the_docstring_is_the_tree():
    upper, lower = errors.__doc__.split("└── Outage")
    names = re.compile(r"\b[A-Z][a-zA-Z]+(?= \d{3}|,)")
    assert set(names.findall(upper)) == {error.__name__ for error in REFUSALS}
    assert set(names.findall(lower)) == {error.__name__ for error in OUTAGES}


def test_a_refusal_is_the_callers_status_and_an_outage_is_not():
    assert all(400 <= error.status < 500 for error in REFUSALS)
    assert all(error.status >= 500 or error.status == 429 for error in OUTAGES)


def test_of_the_refusals_only_a_slow_body_may_be_repeated():
    assert [error.code for error in REFUSALS if error.retryable] == ["request_timeout"]


def test_every_outage_may_be_repeated():
    assert all(error.retryable for error in OUTAGES)


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.code)
def test_the_caller_reads_a_fixed_sentence_and_nothing_of_the_detail(error):
    body = error("https://host/?X-Amz-Signature=secret").body("r-1")
    assert body == {
        "error": {"code": error.code, "message": error.public, "retryable": error.retryable, "request_id": "r-1"}
    }


def test_what_the_error_knows_stands_in_the_body():
    error = TryOnError("detail", field="userId", retry_after_s=7, retryable=False, object_key="users/u/x.jpg")
    body = error.body("r-1")["error"]
    assert (body["field"], body["retry_after_s"], body["retryable"]) == ("userId", 7, False)
    assert body["object_key"] == "users/u/x.jpg"


def test_an_override_of_retryable_stays_with_its_instance():
    assert errors.StorageFailed(retryable=False).retryable is False
    assert errors.StorageFailed().retryable is True


def test_without_a_detail_the_log_gets_the_public_sentence():
    assert str(errors.Draining()) == errors.Draining.public
