"""mask_and_semantics: what is outside the mask is the person's own, and what cannot be dressed is refused."""

from __future__ import annotations

import numpy as np
from PIL import Image as Pillow

from model import geometry
from model.embedded import demo_pictures

from ..pictures import Pixels, file_of, middle, pixels_of, ramp
from ..registry import row
from ..services import REPOSITORY
from ..stage import Stage

MODEL_WH = (768, 1024)
OTHER_JOBS = 20


def readme() -> str:
    """What is documented."""
    return " ".join((REPOSITORY / "README.md").read_text().split())


def at_model_size(picture: Pixels) -> Pixels:
    """The person as the model sees it."""
    return np.asarray(geometry.crop_resize(Pillow.fromarray(picture), *MODEL_WH))


@row("M01", lane="models")
def mask_of_another_size(stage: Stage) -> None:
    """Scaled by nearest pixels, and black or white afterwards."""
    mask = middle(96, 128)
    mask[mask == 255] = 200  # grey, which counts as white
    url = stage.plain.put("M01/mask.png", file_of(mask))
    done = stage.ask(stage.embedded, mask_image_url=url, output_format="png").done()
    scaled = np.asarray(Pillow.fromarray(mask).resize(MODEL_WH, Pillow.Resampling.NEAREST))
    result = pixels_of(stage.stored(done["object_key"]))
    outside = scaled == 0
    assert np.array_equal(result[outside], at_model_size(ramp())[outside]), "pixels outside the scaled mask changed"
    assert "cropped like the person and scaled to it by nearest pixels" in readme()


@row("M03")
def black_mask(stage: Stage) -> None:
    """Nothing to replace."""
    refuses_mask(stage, 0)


@row("M04")
def white_mask(stage: Stage) -> None:
    """Nothing to keep."""
    refuses_mask(stage, 255)
    assert "all black or all white is refused" in readme()


def refuses_mask(stage: Stage, grey: int) -> None:
    """A mask of one grey is refused before a picture is made."""
    url = stage.host.put(f"{stage.row}/mask.png", file_of(np.full((256, 192), grey, np.uint8)))
    with stage.nothing_happens(stage.service):
        stage.ask(stage.service, mask_image_url=url).refused(422, "mask_invalid", retryable=False)


@row("M06")
def half_an_outfit(stage: Stage) -> None:
    """The missing garment is named."""
    with stage.nothing_happens(stage.service):
        for name in ("upper_cloth_url", "lower_cloth_url"):
            stage.ask(stage.service, **{name: None}).refused(422, "invalid_request", field=name)


@row("M07")
def long_garments(stage: Stage) -> None:
    """Padded with white, not stretched: a square drawn on the garment is a square where the engine sees it."""
    service = stage.service
    for width, height in ((100, 800), (800, 100)):
        garment = np.full((height, width, 3), 90, np.uint8)
        top, left = (height - 80) // 2, (width - 80) // 2
        garment[top : top + 80, left : left + 80] = (200, 0, 0)
        url = stage.host.put(f"M07/{width}.png", file_of(garment))
        (service.folder / "keep").touch()
        try:
            stage.ask(service, cloth_type="upper", lower_cloth_url=None, upper_cloth_url=url).done()
        finally:
            (service.folder / "keep").unlink()
        seen = np.load(service.folder / "inputs.npz")["garment"]
        red = (seen[..., 0] > 150) & (seen[..., 1] < 60)
        tall, wide = (np.ptp(np.nonzero(red)[axis]) + 1 for axis in (0, 1))
        assert abs(tall - wide) <= 4, f"{width}x{height}: the square is {wide}x{tall}"
        corner = seen[2, 2]
        assert corner.min() >= 250, f"the padding is {corner}"


@row("M08", lane="models")
def nobody_in_the_photo(stage: Stage) -> None:
    """Refused before the engine runs."""
    service = stage.embedded
    pictures = {
        "grey": np.full((512, 384, 3), 128, np.uint8),
        "noise": np.random.default_rng(8).integers(0, 256, (512, 384, 3), dtype=np.uint8),
    }
    with stage.nothing_happens(service):
        for name, picture in pictures.items():
            url = stage.plain.put(f"M08/{name}.png", file_of(picture))
            answer = stage.ask(service, person_image_url=url, mask_image_url=None)
            answer.refused(422, "person_not_found", retryable=False)


@row("M10", lane="models")
def outside_the_mask(stage: Stage) -> str:
    """Every pixel is the person's own, exactly in a PNG."""
    drawn = demo_pictures()
    urls = {
        f"{role}_{kind}_url": stage.plain.put(f"M10/{role}.png", file_of(drawn[role]))
        for role, kind in (("person", "image"), ("upper", "cloth"), ("lower", "cloth"), ("mask", "image"))
    }
    person, outside = at_model_size(drawn["person"]).astype(int), drawn["mask"] == 0
    far = {}
    for kind in ("png", "jpeg"):
        done = stage.ask(stage.embedded, **urls, output_format=kind).done()
        result = pixels_of(stage.stored(done["object_key"])).astype(int)
        far[kind] = np.abs(result - person)[outside]
        assert np.abs(result - person)[~outside].mean() > 2, "nothing was repainted inside the mask"
    assert far["png"].max() == 0, f"a pixel outside the mask is {far['png'].max()} off"
    assert far["jpeg"].mean() <= 2, f"a JPEG is {far['jpeg'].mean():.2f} off on average"
    assert "every pixel outside the mask is the person's own" in readme()
    return f"repaint is documented; PNG 0 off, JPEG at most {far['jpeg'].max()}, on average {far['jpeg'].mean():.2f}"


@row("M12", lane="models")
def no_memory_of_other_jobs(stage: Stage) -> None:
    """The same request gives the same pixels after twenty others."""
    service = stage.embedded
    person = stage.plain.put("M12/person.png", file_of(ramp(300, 400, tint=7)))
    request = {"person_image_url": person, "output_format": "png", "seed": 12}
    first = stage.ask(service, **request).done()
    kinds = ("upper", "lower", "overall", "inner")
    for number in range(OTHER_JOBS):
        stage.ask(service, seed=number, cloth_type=kinds[number % len(kinds)], num_inference_steps=1).done()
    second = stage.ask(service, **request).done()
    assert first["object_key"] != second["object_key"], "the second was not made anew"
    assert stage.stored(first["object_key"]) == stage.stored(second["object_key"]), "the pixels differ"
