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
    box_mask,
    noise,
    png,
    running_app,
    usual_files,
    usual_request,
)

from container import images
from container.errors import (
    DeadlineExceeded,
    ImageNotFound,
    InvalidRequest,
    JobConflict,
    MaskInvalid,
    NotifyFailed,
    StorageFailed,
    TryOnError,
)
from container.request import CallContext, parse
from container.storage import LocalStorage
from model import geometry

CONTEXT = CallContext("r-1", inference_id="i-1")
KEY = "users/7/vton_result/241108-230001/result.png"


def run(app, context=CONTEXT, **changes):
    return app.service.run(parse(usual_request(**changes)), time.monotonic() + 60, context)


def opened(path):
    with Pillow.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def person_at_model_size():
    return np.asarray(geometry.crop_resize(Pillow.fromarray(noise(seed=1)), 768, 1024))


def test_the_result_is_stored_under_its_key_and_told_once(tmp_path):
    notifier = RecordingNotifier()
    with running_app(tmp_path, notifier=notifier) as app:
        result = run(app)
    assert result.object_key == KEY
    assert opened(tmp_path / KEY).shape == (1024, 768, 3)
    assert (result.width, result.height, result.seed, result.engine) == (768, 1024, 42, "stand-in")
    assert (result.mask_source, result.message) == ("given", "VTON run successfully")
    assert notifier.events == [
        {
            "userId": "7",
            "initial_timestamp": "241108-230001",
            "object_key": KEY,
            "bucket": "",
            "job_id": result.job_id,
            "status": "completed",
            "inference_id": "i-1",
        }
    ]


def test_every_stage_is_timed(tmp_path):
    with running_app(tmp_path) as app:
        times = run(app).timings_ms
    assert set(times) == {
        *("fetch", "decode", "prepare", "queue", "generate", "composite", "encode", "store", "notify", "total")
    }


def test_a_repeat_finds_the_result_and_only_notifies(tmp_path):
    engine, notifier = StandInEngine(), RecordingNotifier()
    with running_app(tmp_path, engine=engine, notifier=notifier) as app:
        first = run(app)
        second = run(app, person_image_url="https://images.example/person.png?X-Amz-Signature=fresh")
    assert (second.object_key, second.etag, second.job_id) == (first.object_key, first.etag, first.job_id)
    assert (second.seed, second.width, second.engine) == (first.seed, first.width, first.engine)
    assert len(engine.made) == 1
    assert [event["job_id"] for event in notifier.events] == [first.job_id] * 2


def test_eight_equal_requests_at_once_make_one_picture(tmp_path):
    engine, results = StandInEngine(seconds=0.05), []
    with running_app(tmp_path, engine=engine) as app:
        threads = [threading.Thread(target=lambda: results.append(run(app))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert len(results) == 8
    assert len({result.etag for result in results}) == 1
    assert len(engine.made) == 1


@pytest.mark.parametrize("change", [{"seed": 43}, {"output_format": "jpeg"}, {"num_inference_steps": 3}])
def test_another_job_under_the_same_user_and_timestamp_is_refused(tmp_path, change):
    engine = StandInEngine()
    with running_app(tmp_path, engine=engine) as app:
        run(app)
        before = (tmp_path / KEY).read_bytes()
        with pytest.raises(JobConflict):
            run(app, **change)
    assert (tmp_path / KEY).read_bytes() == before
    assert len(engine.made) == 1


def test_a_default_that_is_spelled_out_is_the_same_job(tmp_path):
    with running_app(tmp_path) as app:
        first = run(app)
        assert run(app, num_inference_steps=50, guidance_scale=2.5, seed=42).job_id == first.job_id


def test_outside_the_mask_every_pixel_is_the_persons(tmp_path):
    with running_app(tmp_path) as app:
        run(app)
    picture, person = opened(tmp_path / KEY), person_at_model_size()
    outside = np.asarray(Pillow.fromarray(box_mask()).resize((768, 1024), Pillow.Resampling.NEAREST)) == 0
    assert np.array_equal(picture[outside], person[outside])
    assert not np.array_equal(picture[~outside], person[~outside])


def test_without_compositing_the_raw_picture_comes_back(tmp_path):
    with running_app(tmp_path) as app:
        run(app, composite="none")
    assert len(np.unique(opened(tmp_path / KEY).reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize("composite", ["repaint", "none"])
def test_the_persons_own_size_is_kept_when_asked_for(tmp_path, composite):
    files = {**usual_files(), "person.png": png(noise(300, 500, seed=9)), "mask.png": png(box_mask(300, 500))}
    with running_app(tmp_path, fetcher=FakeFetcher(files)) as app:
        result = run(app, output_size="person", composite=composite)
    assert (result.width, result.height) == (500, 300)
    picture = opened(tmp_path / KEY)
    assert picture.shape == (300, 500, 3)
    outside = box_mask(300, 500) == 0
    if composite == "repaint":
        assert np.array_equal(picture[outside], noise(300, 500, seed=9)[outside])
    assert np.array_equal(picture[:, :100], noise(300, 500, seed=9)[:, :100])  # beside the model's crop


def test_a_photo_longer_than_webp_can_hold_is_refused_before_the_picture_is_made(tmp_path):
    files = {**usual_files(), "person.png": png(noise(16_384, 2048, seed=9)), "mask.png": png(box_mask(16_384, 2048))}
    engine = StandInEngine()
    with running_app(tmp_path, fetcher=FakeFetcher(files), engine=engine) as app:
        made = len(engine.made)
        with pytest.raises(InvalidRequest) as refused:
            run(app, output_size="person", output_format="webp")
        assert refused.value.field == "output_format"
        assert len(engine.made) == made
        assert run(app, output_size="person", output_format="png").height == 16_384
        assert run(app, output_format="webp", timestamp="t2").height == 1024


def test_a_mask_of_another_size_is_scaled_to_the_person(tmp_path):
    files = {**usual_files(), "mask.png": png(box_mask(1024, 768))}
    with running_app(tmp_path, fetcher=FakeFetcher(files)) as app:
        run(app)
    picture, person = opened(tmp_path / KEY), person_at_model_size()
    assert np.array_equal(picture[:256], person[:256])
    assert not np.array_equal(picture[300:700, 200:500], person[300:700, 200:500])


@pytest.mark.parametrize("level", [0, 255])
def test_a_mask_of_one_colour_is_refused_before_the_engine(tmp_path, level):
    engine = StandInEngine()
    files = {**usual_files(), "mask.png": png(np.full((256, 192), level, np.uint8))}
    with running_app(tmp_path, engine=engine, fetcher=FakeFetcher(files)) as app, pytest.raises(MaskInvalid):
        run(app)
    assert engine.made == []


def test_a_mask_is_needed_while_there_is_no_masker(tmp_path):
    with running_app(tmp_path) as app, pytest.raises(InvalidRequest) as refused:
        run(app, mask_image_url=None)
    assert refused.value.field == "mask_image_url"


def test_a_garment_that_the_type_does_not_use_is_fetched_by_nobody(tmp_path):
    fetcher = FakeFetcher()
    with running_app(tmp_path, fetcher=fetcher) as app:
        run(app, cloth_type="upper")
    assert not any("lower" in ref for ref in fetcher.asked)


def test_a_garment_eight_times_as_tall_as_wide_is_padded_not_stretched(tmp_path):
    seen = []

    class Looking(StandInEngine):
        def generate(self, inputs, settings):
            seen.append(inputs)
            return super().generate(inputs, settings)

    black = np.zeros((800, 100, 3), np.uint8)
    files = {**usual_files(), "upper.png": png(black)}
    with running_app(tmp_path, engine=Looking(), fetcher=FakeFetcher(files)) as app:
        run(app, cloth_type="upper")
    (inputs,) = seen
    dark = (inputs.garment < 128).all(axis=2)
    assert dark.sum(axis=1).max() == 128  # 1024 / 8: its own proportions
    assert (inputs.garment[:, :300] == 255).all()


def test_a_random_seed_is_told_and_kept_for_the_repeat(tmp_path):
    with running_app(tmp_path) as app:
        first = run(app, seed=-1)
        assert run(app, seed=-1).seed == first.seed
    assert first.seed >= 0


def test_the_same_request_after_other_jobs_gives_the_same_pixels(tmp_path):
    with running_app(tmp_path) as app:
        run(app)
        for number in range(3):
            run(app, seed=number, timestamp=f"t{number}")
        run(app, timestamp="later")
    later = tmp_path / "users/7/vton_result/later/result.png"
    assert later.read_bytes() == (tmp_path / KEY).read_bytes()


def test_a_missing_image_stores_nothing_and_tells_nobody(tmp_path):
    notifier = RecordingNotifier()
    with running_app(tmp_path, notifier=notifier) as app, pytest.raises(ImageNotFound):
        run(app, upper_cloth_url="https://images.example/gone.png")
    assert list(tmp_path.rglob("result*")) == []
    assert notifier.events == []


class Together:
    """Decodes nothing until all four pictures of a request are there."""

    def __init__(self):
        self.barrier = threading.Barrier(4)

    def start(self):
        pass

    def stop(self, timeout_s):
        pass

    def decode(self, content, deadline):
        self.barrier.wait(10)
        return images.decode(content)

    def decode_mask(self, content, deadline):
        self.barrier.wait(10)
        return images.decode_mask(content)


def test_the_pictures_of_a_request_are_decoded_side_by_side(tmp_path):
    with running_app(tmp_path, decoder=Together()) as app:
        run(app)
    outside = np.asarray(Pillow.fromarray(box_mask()).resize((768, 1024), Pillow.Resampling.NEAREST)) == 0
    assert np.array_equal(opened(tmp_path / KEY)[outside], person_at_model_size()[outside])


class Hanging(Together):
    """Takes longer than any request has."""

    def decode(self, content, deadline):
        time.sleep(1)


def test_a_decoder_that_is_not_done_at_the_deadline_is_not_waited_for(tmp_path):
    began = time.monotonic()
    with running_app(tmp_path, decoder=Hanging()) as app, pytest.raises(DeadlineExceeded):
        app.service.run(parse(usual_request()), time.monotonic() + 0.3, CONTEXT)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("damaged", [{"seed": None}, {"width": "wide"}, {"engine": None}])
def test_a_stored_object_with_damaged_facts_is_an_outage_and_makes_no_picture(tmp_path, damaged):
    engine = StandInEngine()
    with running_app(tmp_path, engine=engine) as app:
        run(app)
        path = tmp_path / f"{KEY}.json"
        facts = {**json.loads(path.read_text()), **damaged}
        path.write_text(json.dumps({name: value for name, value in facts.items() if value is not None}))
        with pytest.raises(StorageFailed) as failed:
            run(app)
    assert not failed.value.retryable
    assert len(engine.made) == 1


class FailingStorage(LocalStorage):
    """Refuses to store once."""

    failed = False

    def put(self, key, content, content_type, facts):
        if not self.failed:
            self.failed = True
            raise StorageFailed("once")
        return super().put(key, content, content_type, facts)


def test_when_storing_fails_nobody_is_told_and_a_repeat_mends_it(tmp_path):
    notifier = RecordingNotifier()
    with running_app(tmp_path, notifier=notifier, storage=FailingStorage(tmp_path)) as app:
        with pytest.raises(StorageFailed):
            run(app)
        assert notifier.events == []
        run(app)
    assert len(notifier.events) == 1


def test_when_telling_fails_the_picture_stays_and_a_repeat_only_tells(tmp_path):
    engine, notifier = StandInEngine(), RecordingNotifier()
    notifier.failures.append(NotifyFailed("once", object_key=KEY))
    with running_app(tmp_path, engine=engine, notifier=notifier) as app:
        with pytest.raises(NotifyFailed) as failed:
            run(app)
        assert failed.value.object_key == KEY
        assert (tmp_path / KEY).exists()
        run(app)
    assert len(engine.made) == 1
    assert len(notifier.events) == 1


@pytest.mark.parametrize(("output_format", "kind"), [("jpeg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_the_format_that_was_asked_for_is_stored(tmp_path, output_format, kind):
    with running_app(tmp_path) as app:
        result = run(app, output_format=output_format)
    with Pillow.open(io.BytesIO((tmp_path / result.object_key).read_bytes())) as picture:
        assert picture.format == kind


def test_every_failure_is_of_the_tree(tmp_path):
    files = {**usual_files(), "person.png": b"no image"}
    with running_app(tmp_path, fetcher=FakeFetcher(files)) as app, pytest.raises(TryOnError):
        run(app)
