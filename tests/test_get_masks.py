from __future__ import annotations

import io
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image as Pillow
from stand_in import (
    FakeFetcher,
    RecordingNotifier,
    StandInEngine,
    StandInMasker,
    noise,
    png,
    running_app,
    usual_files,
    usual_request,
)

from container.errors import (
    DeadlineExceeded,
    InvalidRequest,
    JobConflict,
    NotifyFailed,
    PersonNotFound,
    StorageFailed,
)
from container.person_masks import LONGEST_SIDE, REMEMBERED
from container.request import CLOTH_TYPES, CallContext, MaskRequest, parse
from container.storage import LocalStorage
from model import geometry, interface

CONTEXT = CallContext("r-1", inference_id="i-1", custom_attributes="shop=3")
FOLDER = "users/7/masking/241108-230001/"


def mask_request(**changes):
    fields = {
        "task": "mask",
        "userId": "7",
        "timestamp": "241108-230001",
        "person_image_url": "https://images.example/person.png",
        **changes,
    }
    return {name: value for name, value in fields.items() if value is not None}


def run(app, context=CONTEXT, **changes):
    return app.masks.run(parse(mask_request(**changes)), time.monotonic() + 60, context)


def try_on(app, **changes):
    return app.service.run(parse(usual_request(mask_image_url=None, **changes)), time.monotonic() + 60, CONTEXT)


def opened(path):
    with Pillow.open(path) as picture:
        return np.asarray(picture)


def files_with(photo):
    return FakeFetcher({**usual_files(), "person.png": png(photo)})


def test_five_masks_are_stored_where_the_deployed_backend_looks_and_one_message_is_sent(tmp_path):
    results, masks, masker = RecordingNotifier(), RecordingNotifier(), StandInMasker()
    with running_app(tmp_path, masker=masker, notifier=results, mask_notifier=masks) as app:
        result = run(app)
    assert result.object_keys == {name: f"{FOLDER}{name}.png" for name in CLOTH_TYPES}
    for name, key in result.object_keys.items():
        mask = opened(tmp_path / key)
        assert (mask.dtype, mask.shape, set(np.unique(mask))) == (np.uint8, (256, 192), {0, 255})
        assert np.array_equal(mask, StandInMasker().mask(noise(seed=1), name))
    assert (result.width, result.height, result.mask_source, result.mask_cache) == (192, 256, "auto", "miss")
    assert len(masker.seen) == 1
    assert results.events == []
    assert masks.events == [
        {
            "username": "7",
            "userId": "7",
            "initial_timestamp": "241108-230001",
            "object_key": FOLDER,
            "cloth_types": "upper,lower,overall,inner,outer",
            "bucket": "",
            "job_id": result.job_id,
            "status": "completed",
            "inference_id": "i-1",
            "custom_attributes": "shop=3",
        }
    ]


def test_what_the_deployed_system_sends_its_mask_function_is_a_mask_request():
    event = {"username": "7", "row_image_url": "https://images.example/person.png", "timestamp": "241108-230001"}
    expected = parse(mask_request())
    assert isinstance(expected, MaskRequest)
    assert parse({"body": event}) == expected
    assert parse({"task": "mask", **event}) == expected


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"userId": None}, "userId"),
        ({"person_image_url": None}, "person_image_url"),
        ({"timestamp": "a/b"}, "timestamp"),
        ({"cloth_types": []}, "cloth_types"),
        ({"cloth_types": ["hat"]}, "cloth_types"),
        ({"cloth_types": ["upper", "upper"]}, "cloth_types"),
        ({"cloth_types": "upper"}, "cloth_types"),
        ({"username": "8"}, "username"),
        ({"row_image_url": "https://images.example/other.png"}, "row_image_url"),
        ({"upper_cloth_url": "https://images.example/upper.png"}, "upper_cloth_url"),
        ({"task": "masks"}, "task"),
    ],
)
def test_a_bad_mask_request_names_its_field(changes, field):
    with pytest.raises(InvalidRequest) as refused:
        parse(mask_request(**changes))
    assert refused.value.field == field


@pytest.mark.parametrize("fields", [{"body": []}, {"body": {}}, {"body": {"body": {}}}, {"body": {}, "task": "mask"}])
def test_an_event_without_a_mask_request_in_it_is_refused(fields):
    with pytest.raises(InvalidRequest):
        parse(fields)


def test_only_the_asked_types_are_stored(tmp_path):
    with running_app(tmp_path, masker=StandInMasker()) as app:
        result = run(app, cloth_types=["lower", "outer"])
    assert list(result.object_keys) == ["lower", "outer"]
    assert sorted(path.name for path in (tmp_path / FOLDER).glob("*.png")) == ["lower.png", "outer.png"]


def test_more_types_of_the_same_photo_join_those_that_are_there(tmp_path):
    masker = StandInMasker()
    with running_app(tmp_path, masker=masker) as app:
        run(app, cloth_types=["lower"])
        result = run(app)
    assert list(result.object_keys) == list(CLOTH_TYPES)
    assert result.mask_cache == "hit"
    assert len(masker.seen) == 1


def test_a_repeat_finds_the_masks_and_only_notifies(tmp_path):
    notifier, fetcher = RecordingNotifier(), FakeFetcher()
    with running_app(tmp_path, masker=StandInMasker(), fetcher=fetcher, notifier=notifier) as app:
        first, second = run(app), run(app)
    assert (second.object_keys, second.width, second.mask_cache) == (first.object_keys, first.width, None)
    assert len(fetcher.asked) == 1
    assert notifier.events[0] == notifier.events[1]


def test_another_photo_under_the_same_timestamp_is_a_conflict(tmp_path):
    with running_app(tmp_path, masker=StandInMasker()) as app:
        run(app)
        with pytest.raises(JobConflict):
            run(app, person_image_url="https://images.example/upper.png")


def test_another_photo_is_a_conflict_though_it_is_masked_for_another_type(tmp_path):
    with running_app(tmp_path, masker=StandInMasker()) as app:
        run(app, cloth_types=["upper"])
        with pytest.raises(JobConflict):
            run(app, cloth_types=["lower"], person_image_url="https://images.example/upper.png")


def test_a_fault_between_two_masks_loses_nothing(tmp_path):
    class FailsAtTheThird(LocalStorage):
        puts = 0

        def put(self, key, content, content_type, facts):
            self.puts += 1
            if self.puts == 3:
                raise StorageFailed("away")
            return super().put(key, content, content_type, facts)

    notifier = RecordingNotifier()
    with running_app(tmp_path, masker=StandInMasker(), storage=FailsAtTheThird(tmp_path), notifier=notifier) as app:
        with pytest.raises(StorageFailed):
            run(app)
        assert notifier.events == []
        assert list(run(app).object_keys) == list(CLOTH_TYPES)
    assert len(notifier.events) == 1


def test_stored_masks_with_damaged_facts_are_an_outage(tmp_path):
    with running_app(tmp_path, masker=StandInMasker()) as app:
        for key in run(app).object_keys.values():
            path = tmp_path / f"{key}.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "width": "wide"}))
        with pytest.raises(StorageFailed) as failed:
            run(app)
    assert not failed.value.retryable


def test_a_message_that_was_not_sent_is_sent_by_a_repeat(tmp_path):
    notifier = RecordingNotifier()
    notifier.failures = [NotifyFailed("away", object_key=FOLDER)]
    with running_app(tmp_path, masker=StandInMasker(), notifier=notifier) as app:
        with pytest.raises(NotifyFailed):
            run(app)
        run(app)
    assert len(notifier.events) == 1


def test_without_a_masker_a_mask_request_is_refused(tmp_path):
    with running_app(tmp_path) as app, pytest.raises(InvalidRequest) as refused:
        run(app)
    assert refused.value.field == "task"


def test_a_try_on_without_a_mask_gives_the_picture_of_the_stored_mask(tmp_path):
    files = usual_files()
    with running_app(tmp_path, masker=StandInMasker(), fetcher=FakeFetcher(files)) as app:
        masks = run(app)
        files["stored.png"] = (tmp_path / masks.object_keys["upper"]).read_bytes()
        auto = try_on(app, cloth_type="upper", timestamp="a")
        given = app.service.run(
            parse(usual_request(cloth_type="upper", timestamp="b", mask_image_url="https://images.example/stored.png")),
            time.monotonic() + 60,
            CONTEXT,
        )
    assert (auto.mask_source, auto.mask_cache) == ("auto", "hit")
    assert (given.mask_source, given.mask_cache) == ("given", None)
    assert (tmp_path / auto.object_key).read_bytes() == (tmp_path / given.object_key).read_bytes()


def test_the_second_try_on_of_a_person_skips_the_masker_whatever_the_type(tmp_path):
    masker = StandInMasker()
    with running_app(tmp_path, masker=masker) as app:
        first = try_on(app, cloth_type="upper", timestamp="a")
        second = try_on(app, cloth_type="lower", timestamp="b")
        samples = {
            s.labels["outcome"]: s.value
            for s in app.metrics.mask_cache.collect()[0].samples
            if s.name.endswith("_total")
        }
    assert (first.mask_cache, second.mask_cache) == ("miss", "hit")
    assert len(masker.seen) == 1
    assert samples == {"miss": 1, "hit": 1}
    assert {"mask", "mask_queue"} <= set(first.timings_ms)


def test_a_repeat_of_an_automatic_try_on_says_how_it_was_masked(tmp_path):
    with running_app(tmp_path, masker=StandInMasker()) as app:
        try_on(app)
        repeated = try_on(app)
    assert (repeated.mask_source, repeated.mask_cache) == ("auto", None)


def test_two_requests_with_one_photo_mask_it_once(tmp_path):
    masker = StandInMasker()
    with running_app(tmp_path, masker=masker) as app:
        threads = [threading.Thread(target=try_on, args=(app,), kwargs={"timestamp": name}) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert len(masker.seen) == 1


def test_a_photo_without_a_person_is_refused_before_the_engine_and_not_remembered(tmp_path):
    engine, masker = StandInEngine(), StandInMasker()
    masker.failures = [interface.PersonNotFound("nobody")]
    with running_app(tmp_path, engine=engine, masker=masker) as app:
        with pytest.raises(PersonNotFound):
            try_on(app)
        assert engine.made == []
        assert try_on(app).mask_cache == "miss"


def test_a_mask_that_is_empty_where_the_model_looks_is_no_person(tmp_path):
    class Nothing(StandInMasker):
        def masks(self, person, cloth_types):
            return {name: np.zeros(person.shape[:2], np.uint8) for name in cloth_types}

    engine = StandInEngine()
    with running_app(tmp_path, engine=engine, masker=Nothing()) as app, pytest.raises(PersonNotFound):
        try_on(app)
    assert engine.made == []


def test_a_large_photo_is_looked_at_small_and_its_masks_have_its_size(tmp_path):
    masker = StandInMasker()
    with running_app(tmp_path, masker=masker, fetcher=files_with(noise(2048, 1000))) as app:
        result = run(app)
    assert masker.seen[0].shape == (LONGEST_SIDE, 500, 3)
    assert (result.width, result.height) == (1000, 2048)
    small = StandInMasker().mask(masker.seen[0], "lower")
    assert np.array_equal(opened(tmp_path / result.object_keys["lower"]), geometry.resize_mask(small, 1000, 2048))


def test_no_more_photos_than_its_limit_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr("container.person_masks.REMEMBERED", 2)
    assert REMEMBERED == 256
    masker, files = StandInMasker(), usual_files()
    with running_app(tmp_path, masker=masker, fetcher=FakeFetcher(files)) as app:
        for place, seed in enumerate((1, 2, 3, 1)):
            files["person.png"] = png(noise(seed=seed))
            assert run(app, timestamp=str(place)).mask_cache == "miss"
    assert len(masker.seen) == 4


def test_a_deadline_that_passes_while_the_photo_waits_is_told(tmp_path):
    engine = StandInEngine()
    engine.may_end.clear()
    with running_app(tmp_path, engine=engine, masker=StandInMasker()) as app:
        busy = threading.Thread(
            target=lambda: app.service.run(parse(usual_request()), time.monotonic() + 60, CONTEXT), daemon=True
        )
        busy.start()
        assert engine.begun.wait(30)
        with pytest.raises(DeadlineExceeded):
            app.masks.run(parse(mask_request()), time.monotonic() + 0.2, CONTEXT)
        engine.may_end.set()
        busy.join(10)
        assert run(app).object_keys


def test_a_mask_file_is_a_grey_png_without_metadata(tmp_path):
    with running_app(tmp_path, masker=StandInMasker()) as app:
        result = run(app)
    with Pillow.open(io.BytesIO((tmp_path / result.object_keys["upper"]).read_bytes())) as picture:
        assert (picture.format, picture.mode, picture.info) == ("PNG", "L", {})
