from __future__ import annotations

import contextlib
import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from container.errors import InvalidRequest, Refusal
from container.request import GARMENTS_OF, MAX_SEED, TryOnRequest, TryOnResult, parse

FIELDS = {
    "userId": "7",
    "timestamp": "241108-230001",
    "person_image_url": "https://images.example/person.jpg",
    "upper_cloth_url": "https://images.example/upper.jpg",
    "lower_cloth_url": "https://images.example/lower.jpg",
    "mask_image_url": "https://images.example/mask.png",
    "cloth_type": "overall",
}
JOB_ID = "6102b4c189db7a50429638ae5b0a09714fd14b535bedff3a566691f80381316f"
REQUIRED = ("userId", "timestamp", "person_image_url", "upper_cloth_url", "lower_cloth_url")
WRONG_TYPES = [
    ("userId", 7),
    ("userId", None),
    ("userId", ["7"]),
    ("timestamp", None),
    ("timestamp", 241108),
    ("person_image_url", []),
    ("person_image_url", {}),
    ("upper_cloth_url", 1),
    ("mask_image_url", False),
    ("cloth_type", 1),
    ("num_inference_steps", "15"),
    ("num_inference_steps", 15.0),
    ("num_inference_steps", True),
    ("guidance_scale", "2.5"),
    ("guidance_scale", True),
    ("seed", 1.0),
    ("seed", "42"),
    ("output_quality", 95.0),
    ("composite", True),
    ("task", None),
]
OUT_OF_RANGE = [
    ("num_inference_steps", 0),
    ("num_inference_steps", 101),
    ("num_inference_steps", 10**30),
    ("guidance_scale", 0.99),
    ("guidance_scale", 10.01),
    ("guidance_scale", float("inf")),
    ("guidance_scale", float("nan")),
    ("guidance_scale", 10**400),
    ("seed", -2),
    ("seed", MAX_SEED + 1),
    ("output_quality", 0),
    ("output_quality", 101),
    ("output_format", "gif"),
    ("output_format", "JPEG"),
    ("output_size", "huge"),
    ("composite", "blend"),
    ("task", "masks"),
    ("person_image_url", ""),
    ("person_image_url", "https://a.example/" + "x" * 2031),
    ("person_image_url", "https://a.example/\ud800"),
]
BAD_IDS = [
    "../../etc",
    "a/b",
    "a\\b",
    ".",
    "..",
    "",
    "x" * 65,
    "x" * 10_240,
    "-a",
    "_a",
    "a b",
    "a\n",
    "a\r\n",
    "\na",
    "a\x00",
    "a%2fb",
    "../x",
    "240901-000000/../../y",
    "\u0662\u0664\u0660\u0669\u0660\u0661",
    "\uff11\uff12",
    "\u00e9",
    "a\u200b",
    "\ud800",
]


def refused_field(fields):
    with pytest.raises(InvalidRequest) as caught:
        parse(fields)
    return caught.value.field


def job_id(**changes):
    return parse({**FIELDS, **changes}).job_id()


def test_the_deployed_callers_seven_strings_are_a_request():
    assert parse(FIELDS).model_dump(exclude_unset=True) == FIELDS


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_field_is_named(name):
    assert refused_field({key: value for key, value in FIELDS.items() if key != name}) == name


def test_mask_and_cloth_type_may_be_left_out():
    found = parse({name: FIELDS[name] for name in REQUIRED})
    assert (found.mask_image_url, found.cloth_type) == (None, "overall")


def test_an_unknown_field_is_named():
    assert refused_field({**FIELDS, "attn_ckpt": "/etc/passwd"}) == "attn_ckpt"


@pytest.mark.parametrize("name", ["", "a b", "a\nb", "<script>", "x" * 65, "\u00e9", "\ud800"])
def test_the_name_of_an_unknown_field_is_not_echoed_unless_it_is_plain(name):
    assert refused_field({**FIELDS, name: 1}) is None


@pytest.mark.parametrize("cloth_type", ["hat", "OVERALL", "", "overall "])
def test_a_cloth_type_outside_the_closed_set_is_refused(cloth_type):
    assert refused_field({**FIELDS, "cloth_type": cloth_type}) == "cloth_type"


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES)
def test_a_value_of_another_type_is_refused_and_not_coerced(name, value):
    assert refused_field({**FIELDS, name: value}) == name


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused(name, value):
    assert refused_field({**FIELDS, name: value}) == name


@pytest.mark.parametrize("name", ["userId", "timestamp"])
@pytest.mark.parametrize("value", BAD_IDS)
def test_an_id_outside_the_grammar_is_refused(name, value):
    assert refused_field({**FIELDS, name: value}) == name


@pytest.mark.parametrize("value", ["7", "A", "a" * 64, "241108-230001", "user_1-B"])
def test_an_id_inside_the_grammar_is_taken_as_it_is(value):
    assert parse({**FIELDS, "userId": value, "timestamp": value}).userId == value


@pytest.mark.parametrize("body", [None, [], "x", 7, True])
def test_a_body_that_is_no_object_is_refused_without_a_field(body):
    assert refused_field(body) is None


@pytest.mark.parametrize(("name", "value"), [("userId", "s3cr3t\n"), ("cloth_type", "s3cr3t"), ("s3cr3t\n", 1)])
def test_the_callers_values_are_not_echoed(name, value):
    with pytest.raises(InvalidRequest) as caught:
        parse({**FIELDS, name: value})
    assert "s3cr3t" not in json.dumps(caught.value.body("r-1"))


@pytest.mark.parametrize(("name", "value"), [("userId", "s3cr3t\n"), ("person_image_url", ["s3cr3t"])])
def test_the_callers_values_are_not_in_the_detail(name, value):
    with pytest.raises(InvalidRequest) as caught:
        parse({**FIELDS, name: value})
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize("name", ["num_inference_steps", "guidance_scale", "output_quality", "seed"])
def test_the_ends_of_a_range_are_inside(name):
    ends = {"num_inference_steps": (1, 100), "guidance_scale": (1, 10), "output_quality": (1, 100)}
    for value in ends.get(name, (-1, MAX_SEED)):
        assert getattr(parse({**FIELDS, name: value}), name) == value


@pytest.mark.parametrize(
    ("cloth_type", "urls"),
    [
        ("upper", ("https://images.example/upper.jpg",)),
        ("inner", ("https://images.example/upper.jpg",)),
        ("outer", ("https://images.example/upper.jpg",)),
        ("lower", ("https://images.example/lower.jpg",)),
        ("overall", ("https://images.example/upper.jpg", "https://images.example/lower.jpg")),
    ],
)
def test_a_cloth_type_uses_its_own_garments_only(cloth_type, urls):
    assert parse({**FIELDS, "cloth_type": cloth_type}).garment_urls() == urls


@pytest.mark.parametrize("cloth_type", GARMENTS_OF)
def test_the_garment_that_a_cloth_type_needs_is_named(cloth_type):
    bare = {name: FIELDS[name] for name in ("userId", "timestamp", "person_image_url")}
    assert refused_field({**bare, "cloth_type": cloth_type}) == GARMENTS_OF[cloth_type][0]


def test_a_full_garment_stands_for_top_and_bottom():
    dress = {name: FIELDS[name] for name in ("userId", "timestamp", "person_image_url")}
    dress["overall_cloth_url"] = "https://images.example/dress.jpg"
    assert parse(dress).garment_urls() == ("https://images.example/dress.jpg",)


def test_a_full_garment_beside_a_top_is_refused():
    assert refused_field({**FIELDS, "overall_cloth_url": "https://images.example/dress.jpg"}) == "overall_cloth_url"


def test_defaults_fill_open_places_only():
    found = parse({**FIELDS, "num_inference_steps": 30}).with_defaults(steps=50, guidance=2.5)
    assert (found.num_inference_steps, found.guidance_scale) == (30, 2.5)


def test_a_request_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        parse(FIELDS).userId = "8"


def test_the_identity_of_a_job_does_not_change_between_releases():
    assert parse(FIELDS).with_defaults(steps=50, guidance=2.5).job_id() == JOB_ID


def test_the_order_of_the_fields_is_no_part_of_a_jobs_identity():
    assert parse(dict(reversed(list(FIELDS.items())))).job_id() == job_id()


def test_a_default_that_is_spelt_out_is_the_same_job():
    assert job_id(seed=42, composite="repaint", output_format="jpeg", output_quality=95, task="try_on") == job_id()


@pytest.mark.parametrize(
    "query",
    [
        "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Date=20241108T230001Z&X-Amz-Expires=3600&X-Amz-Signature=0123abcd"
        "&X-Amz-Credential=AKIA%2F20241108&X-Amz-Security-Token=Fwo%2B&X-Amz-SignedHeaders=host",
        "x-amz-signature=1",
        "X-Goog-Signature=1&X-Goog-Date=2",
        "AWSAccessKeyId=AKIA&Signature=a%2Fb&Expires=1731106801",
        "Policy=abc&Signature=def&Key-Pair-Id=K1",
        "Expires=1731106801&Signature=def&Key-Pair-Id=K1",
        "GoogleAccessId=me%40project&Expires=1731106801&Signature=def",
    ],
)
@pytest.mark.parametrize("name", ["person_image_url", "upper_cloth_url", "lower_cloth_url", "mask_image_url"])
def test_a_re_signed_url_is_the_same_job(name, query):
    assert job_id(**{name: f"{FIELDS[name]}?{query}"}) == job_id()


@pytest.mark.parametrize(
    "changes",
    [
        {"person_image_url": "https://images.example/other.jpg"},
        {"person_image_url": "https://images.example/person.jpg?versionId=2"},
        {"upper_cloth_url": "https://images.example/other.jpg"},
        {"lower_cloth_url": "https://images.example/other.jpg"},
        {"mask_image_url": "https://images.example/other.png"},
        {"upper_cloth_url": FIELDS["lower_cloth_url"], "lower_cloth_url": FIELDS["upper_cloth_url"]},
        {"cloth_type": "upper"},
        {"cloth_type": "inner"},
        {"userId": "8"},
        {"timestamp": "241108-230002"},
        {"num_inference_steps": 49},
        {"guidance_scale": 3.0},
        {"seed": 43},
        {"seed": -1},
        {"composite": "none"},
        {"output_size": "person"},
        {"output_format": "png"},
        {"output_quality": 90},
    ],
    ids=json.dumps,
)
def test_other_pictures_or_numbers_are_another_job(changes):
    assert job_id(**changes) != job_id()


def test_an_unsigned_part_of_the_query_is_part_of_the_jobs_identity():
    signed = "https://images.example/p.jpg?v={}&X-Amz-Signature={}"
    assert job_id(person_image_url=signed.format(1, "a")) == job_id(person_image_url=signed.format(1, "b"))
    assert job_id(person_image_url=signed.format(1, "a")) != job_id(person_image_url=signed.format(2, "a"))


@pytest.mark.parametrize(
    ("one", "other"),
    [("f=%BB%F3%C0%C7", "f=%C7%CF%C0%C7"), ("policy=red", "policy=blue"), ("expires=1", "expires=2"), ("f=%ff", "f=")],
)
def test_queries_that_name_different_pictures_are_different_jobs(one, other):
    url = "https://images.example/p.jpg?{}"
    assert job_id(person_image_url=url.format(one)) != job_id(person_image_url=url.format(other))


def test_a_garment_that_the_cloth_type_does_not_use_is_no_part_of_the_jobs_identity():
    other = {"cloth_type": "upper", "lower_cloth_url": "https://images.example/other.jpg"}
    assert job_id(**other) == job_id(cloth_type="upper")


def test_guidance_as_a_whole_number_is_the_same_job():
    assert job_id(guidance_scale=3) == job_id(guidance_scale=3.0)


@pytest.mark.parametrize("url", ["https://[", "\u00bd", "https://a.example/?%zz", "https://a.example/?a;b=c"])
def test_what_is_no_url_has_an_identity_all_the_same(url):
    assert len(job_id(person_image_url=url)) == 64


@given(st.text(min_size=1, max_size=300))
@settings(deadline=None)
def test_any_text_as_a_url_is_a_request_with_an_identity(url):
    assert len(job_id(person_image_url=url)) == 64


@given(
    st.dictionaries(
        st.sampled_from(sorted(TryOnRequest.model_fields)) | st.text(max_size=5),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text(), max_size=2),
        max_size=8,
    )
)
@settings(deadline=None)
def test_any_json_object_is_a_request_or_a_refusal(changes):
    with contextlib.suppress(Refusal):
        parse({**FIELDS, **changes})


def test_the_answer_keeps_the_deployed_systems_message():
    message = {field.name: field.default for field in dataclasses.fields(TryOnResult)}["message"]
    assert message == "VTON run successfully"
