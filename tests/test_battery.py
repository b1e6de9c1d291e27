"""Which test holds each row of the battery's groups that the service answers today."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
BATTERY = json.loads((TESTS / "faults" / "battery.json").read_text())
GROUPS = ("http_and_json", "mask_and_semantics", "keys_and_idempotency")
HELD_BY = {
    "H01": "test_vton_api.test_h01_h02_what_is_no_json_is_400",
    "H02": "test_vton_api.test_h01_h02_what_is_no_json_is_400",
    "H03": "test_vton_api.test_h03_json_that_is_no_object_is_422",
    "H04": "test_vton_api.test_h04_m06_a_missing_field_is_named",
    "H05": "test_vton_api.test_a_field_out_of_its_range_is_named_and_never_echoed",
    "H06": "test_vton_api.test_a_field_out_of_its_range_is_named_and_never_echoed",
    "H07": "test_vton_api.test_a_field_out_of_its_range_is_named_and_never_echoed",
    "H14": "test_vton_api.test_h14_a_large_body_is_refused_before_it_is_read",
    "H16": "test_vton_api.test_h16_a_body_that_does_not_come_is_408_and_the_connection_closes",
    "H18": "test_vton_api.test_h18_endless_headers_end_in_a_refusal_and_the_next_request_passes",
    "H19": "test_vton_api.test_h19_another_content_type_is_415",
    "H22": "test_vton_api.test_h22_h24_other_paths_and_methods_get_our_error_body",
    "H24": "test_vton_api.test_h22_h24_other_paths_and_methods_get_our_error_body",
    "H25": "test_vton_api.test_h25_a_client_that_leaves_costs_no_place",
    "M01": "test_get_vton.test_a_mask_of_another_size_is_scaled_to_the_person",
    "M03": "test_get_vton.test_a_mask_of_one_colour_is_refused_before_the_engine",
    "M04": "test_get_vton.test_a_mask_of_one_colour_is_refused_before_the_engine",
    "M06": "test_vton_api.test_h04_m06_a_missing_field_is_named",
    "M07": "test_get_vton.test_a_garment_eight_times_as_tall_as_wide_is_padded_not_stretched",
    "M08": "test_get_masks.test_a_photo_without_a_person_is_refused_before_the_engine_and_not_remembered",
    "M10": "test_get_vton.test_outside_the_mask_every_pixel_is_the_persons",
    "M12": "test_get_vton.test_the_same_request_after_other_jobs_gives_the_same_pixels",
    "K01": "test_vton_api.test_a_field_out_of_its_range_is_named_and_never_echoed",
    "K03": "test_vton_api.test_a_field_out_of_its_range_is_named_and_never_echoed",
    "K05": "test_endpoint.test_two_equal_requests_give_one_generation_and_the_same_bytes",
    "K06": "test_get_vton.test_eight_equal_requests_at_once_make_one_picture",
}


def test_every_row_of_these_groups_has_its_test():
    rows = {row["id"] for row in BATTERY if row["group"] in GROUPS}
    assert rows == HELD_BY.keys()


@pytest.mark.parametrize("held_by", sorted(set(HELD_BY.values())))
def test_the_test_that_holds_a_row_is_there(held_by):
    module, name = held_by.split(".")
    assert re.search(rf"^def {name}\(", (TESTS / f"{module}.py").read_text(), re.MULTILINE)
