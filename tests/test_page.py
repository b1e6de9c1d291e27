"""`vton demo --web`: the real process with the embedded model, before a real browser."""

from __future__ import annotations

import ast
import base64
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image as Pillow
from playwright.sync_api import expect, sync_playwright
from test_page_api import opened as stand_in

from container.images import decode, decode_mask
from deploy.demo import BUCKET, FAKE_KEYS, free_port, png
from model.embedded import demo_pictures
from model.interface import OutOfMemory

pytestmark = pytest.mark.browser

VTON = str(Path(sys.executable).with_name("vton"))
REPOSITORY = Path(__file__).parents[1]
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NARROW, PHONE, DESK = {"width": 320, "height": 640}, {"width": 390, "height": 844}, {"width": 1280, "height": 900}
PATIENCE_MS = 60_000
PICTURES = demo_pictures()
PERSON, UPPER = png(PICTURES["person"]), png(PICTURES["upper"])

expect.set_options(timeout=PATIENCE_MS)


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VTON_", "SAGEMAKER_", "AWS_"))}
    return {**kept, "PYTHONPATH": str(REPOSITORY), **more}


@pytest.fixture(scope="module")
def browser():
    names = (os.environ.get("VTON_TEST_BROWSER"), "chromium", "chromium-browser", "google-chrome")
    found = next((path for path in (shutil.which(name) for name in names if name) if path), None)
    assert found, "no Chromium is installed: `make test-page` does that, or VTON_TEST_BROWSER names one"
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The URL of the page of a process, and the folder that it runs in."""
    folder, port = tmp_path_factory.mktemp("page"), free_port()
    opener = folder / "opener"
    opener.write_text(f'#!/bin/sh\necho "$1" > {folder}/opened\n')
    opener.chmod(0o755)
    environ = environment(BROWSER=str(opener))
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen([VTON, "demo", "--web", "--port", str(port)], cwd=folder, env=environ, stderr=log)
    url = f"http://127.0.0.1:{port}/"
    try:
        ends = time.monotonic() + 180
        while not listens(url):
            assert process.poll() is None and time.monotonic() < ends, (folder / "serve.log").read_text()[-2000:]
            time.sleep(0.1)
        yield url, folder
        process.send_signal(signal.SIGINT)
        assert process.wait(40) == 0
    finally:
        process.kill()
        process.wait()


def listens(url):
    try:
        return requests.get(url, timeout=30).status_code == 200
    except requests.exceptions.ConnectionError:
        return False


@contextmanager
def opened(browser, url, *, noise=(), settings=None, **options):
    """The page, ready; what it wrote to the console, or what failed, fails the test, but for these patterns."""
    context = browser.new_context(**{"viewport": DESK, "accept_downloads": True, **options})
    page, heard = context.new_page(), []
    page.on("console", lambda message: heard.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: heard.append(f"error: {error}"))
    page.on("requestfailed", lambda request: heard.append(f"failed: {request.url} {request.failure}"))
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    if settings is not None:
        page.route("**/page/settings", settings)
    try:
        page.goto(url)
        expect(page.locator("#health")).to_have_attribute("data-state", "healthy")
        yield page
        assert not [line for line in heard if not any(re.search(pattern, line) for pattern in noise)]
        assert all(each.startswith((url, "blob:")) for each in asked)
    finally:
        context.close()


@pytest.fixture
def page(browser, served):
    with opened(browser, served[0]) as page:
        yield page


def use_example(page):
    page.get_by_role("button", name="Use example pictures").click()
    expect(page.locator("#examples")).to_have_text("Use another example")
    expect(page.locator("#mask-tag")).to_contain_text("Automatic")


def choose(page, name, content, file_name="picture.png", media_type="image/png"):
    tile = page.locator(f"[data-picture={name}] input")
    tile.set_input_files({"name": file_name, "mimeType": media_type, "buffer": content})


def paint(page, start, end):
    """A stroke between two points of the photo, as shares of its sides."""
    page.locator("#mask-canvas").scroll_into_view_if_needed()
    box = page.locator("#mask-canvas").bounding_box()
    page.mouse.move(box["x"] + start[0] * box["width"], box["y"] + start[1] * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + end[0] * box["width"], box["y"] + end[1] * box["height"], steps=8)
    page.mouse.up()


def covered(page):
    return int(re.search(r"(\d+) %", page.locator("#mask-tag").inner_text())[1])


def run(page):
    page.get_by_role("button", name="Try it on").click()
    expect(page.locator("#compare")).to_be_visible()
    expect(page.locator("#run")).to_be_visible()


def saved(page, name):
    """The bytes that a button or link downloads."""
    with page.expect_download() as waited:
        page.locator(name).click()
    return Path(waited.value.path()).read_bytes()


def job(page):
    return page.locator("#facts dd").last.inner_text()


def example(url, cloth):
    """The files of the first example, by their fields."""
    tiles = {"person_image": "person", "cloth_image": cloth}
    return {
        field: requests.get(f"{url}page/examples/0/{tile}.png", timeout=60).content for field, tile in tiles.items()
    }


def asked(url, files, **fields):
    answer = requests.post(f"{url}api/try-on", files=files, data=fields, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.headers["X-Job-Id"], base64.b64decode(answer.json()["imageBase64"])


# --- what it is for


def test_the_command_opens_the_page_in_a_browser(served):
    url, folder = served
    ends = time.monotonic() + 180
    while not (folder / "opened").exists():
        assert time.monotonic() < ends
        time.sleep(0.1)
    assert (folder / "opened").read_text() == f"{url}\n"
    assert url in (folder / "serve.log").read_text()


def test_a_try_on_with_an_edited_mask_is_the_job_and_the_picture_of_the_rest_door(page, served):
    use_example(page)
    before = covered(page)
    paint(page, (0.2, 0.1), (0.8, 0.1))
    expect(page.locator("#mask-tag")).to_contain_text("Edited")
    assert covered(page) > before
    page.get_by_label("Erase").check(force=True)
    paint(page, (0.5, 0.4), (0.5, 0.5))
    page.get_by_label("Format").select_option("png")
    run(page)
    mask, picture = saved(page, "#save-mask"), saved(page, "#download")
    drawn = decode_mask(mask)
    assert drawn.shape == PICTURES["person"].shape[:2]
    assert set(np.unique(drawn)) == {0, 255}
    assert drawn[102, 384] == 255 and drawn[460, 384] == 0
    files = {**example(served[0], "upper"), "mask_image": mask}
    fields = {"num_inference_steps": 8, "guidance_scale": 1, "output_format": "png", "output_size": "model"}
    assert asked(served[0], files, **fields) == (job(page), picture)
    changed = (decode(picture) != PICTURES["person"]).any(axis=2)
    assert not changed[drawn == 0].any()
    assert changed[drawn == 255].mean() > 0.9


def test_the_steps_follow_the_quality_until_they_are_set(browser, served):
    def with_more_steps(route):
        route.fulfill(json={**route.fetch().json(), "steps": 50, "fast_steps": 20})

    with opened(browser, served[0], settings=with_more_steps) as page:
        steps, quality = page.get_by_label("Steps"), page.get_by_label("Quality")
        for name, value in (("fast", "20"), ("balanced", "50"), ("fast", "20")):
            quality.select_option(name)
            expect(steps).to_have_value(value)
        steps.fill("12")
        quality.select_option("exact")
        expect(steps).to_have_value("12")


def test_without_an_edit_the_service_makes_the_mask(page, served):
    use_example(page)
    run(page)
    files = example(served[0], "upper")
    assert asked(served[0], files, num_inference_steps=8, guidance_scale=1) == (job(page), saved(page, "#download"))


@pytest.mark.parametrize("edited", [False, True])
def test_the_curl_command_that_is_shown_makes_the_identical_picture(page, tmp_path, edited):
    use_example(page)
    page.get_by_label("Overall").check(force=True)
    expect(page.locator("#mask-wait")).to_be_hidden()
    if edited:
        paint(page, (0.3, 0.15), (0.7, 0.15))
        (tmp_path / "mask.png").write_bytes(saved(page, "#save-mask"))
    page.get_by_label("Steps").fill("3")
    page.get_by_label("Guidance").fill("1.5")
    page.get_by_label("Seed", exact=True).fill("9223372036854775807")
    page.get_by_label("Size", exact=True).select_option("person")
    page.get_by_label("Format").select_option("webp")
    run(page)
    page.locator("#curl summary").click()
    command = page.locator("#curl-text").inner_text()
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "result.webp").read_bytes() == saved(page, "#download")


def test_the_command_names_files_as_a_shell_and_curl_take_them(page, tmp_path):
    name = """it's, a "photo"; $(touch no) `touch no` \\ é.png"""
    choose(page, "person", PERSON, name)
    choose(page, "upper", UPPER, "-F.png")
    expect(page.locator("#mask-tag")).to_contain_text("Automatic")
    page.get_by_label("Steps").fill("2")
    run(page)
    (tmp_path / name).write_bytes(PERSON)
    (tmp_path / "-F.png").write_bytes(UPPER)
    command = page.locator("#curl-text").text_content()
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment(), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "result.jpg").read_bytes() == saved(page, "#download")
    assert {path.name for path in tmp_path.iterdir()} == {name, "-F.png", "result.jpg"}


@pytest.mark.parametrize(
    "names",
    [("image.png", "image.png"), ("Photo.png", "photo.png"), ("result.jpg", "top.png"), ("top.png", "mask.png")],
)
def test_files_whose_names_would_be_one_have_two_in_the_command_and_in_the_code(page, tmp_path, names):
    for part, content, name in zip(("person", "upper"), (PERSON, UPPER), names):
        choose(page, part, content, name)
    expect(page.locator("#mask-tag")).to_contain_text("Automatic")
    paint(page, (0.3, 0.15), (0.7, 0.15))
    page.get_by_label("Steps").fill("1")
    run(page)
    person, cloth = (f"{part}.{name.split('.')[1]}" for part, name in zip(("person", "cloth"), names))
    for name, content in ((person, PERSON), (cloth, UPPER), ("mask.png", saved(page, "#save-mask"))):
        (tmp_path / name).write_bytes(content)
    command, code = (page.locator(f"#{name}-text").text_content() for name in ("curl", "boto3"))
    note = f"# names repeat: copy what was chosen to {person} and {cloth} first\n"
    assert note in command and note in code
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment(), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "result.jpg").read_bytes() == saved(page, "#download")
    files = next(
        node.value
        for node in ast.parse(code).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FILES"
    )
    assert ast.literal_eval(files) == {
        "person_image_url": person,
        "upper_cloth_url": cloth,
        "mask_image_url": "mask.png",
    }


@pytest.mark.parametrize("outfit", ["lower", "two", "one"])
def test_the_boto3_code_that_is_shown_makes_the_identical_picture(page, served, endpoint, tmp_path, outfit):
    use_example(page)
    page.get_by_label("Lower" if outfit == "lower" else "Overall").check(force=True)
    if outfit == "one":
        page.get_by_role("radio", name="Dress or one piece").check(force=True)
    page.get_by_label("Steps").fill("2")
    if outfit == "two":
        paint(page, (0.3, 0.15), (0.7, 0.15))
        (tmp_path / "mask.png").write_bytes(saved(page, "#save-mask"))
    run(page)
    for name in ("person", "upper", "lower", "dress"):
        (tmp_path / f"{name}.png").write_bytes(
            requests.get(f"{served[0]}page/examples/0/{name}.png", timeout=60).content
        )
    code = page.locator("#boto3-text").text_content().replace("your-bucket", BUCKET)
    environ = environment(
        **FAKE_KEYS,
        AWS_ENDPOINT_URL_S3=endpoint.cloud.url,
        AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME=endpoint.runtime,
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "users/page/vton_result/" in done.stdout
    assert (tmp_path / "result.jpg").read_bytes() == saved(page, "#download")


def test_a_drawn_seed_is_shown_to_the_last_digit(page):
    use_example(page)
    page.get_by_label("Steps").fill("2")
    page.get_by_label("Seed", exact=True).fill("-1")
    run(page)
    drawn, picture = page.locator("#facts dd").first.inner_text(), saved(page, "#download")
    page.get_by_label("Seed", exact=True).fill(drawn)
    run(page)
    expect(page.locator("#facts dd").first).to_have_text(drawn)
    assert saved(page, "#download") == picture


def test_progress_is_shown_and_a_run_can_be_cancelled(browser, tmp_path):
    with stand_in(tmp_path) as stage, opened(browser, f"{stage.url}/", noise=["stream net::ERR_ABORTED"]) as page:
        use_example(page)
        stage.engine.may_end.clear()
        page.get_by_role("button", name="Try it on").click()
        expect(page.locator("#progress-text")).to_have_text("Step 1 of 50")
        assert page.locator("#progress-bar").evaluate("bar => bar.value") == 1 / 50
        expect(page.get_by_role("button", name="Cancel")).to_be_focused()
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#announce")).to_have_text("Cancelled.")
        expect(page.locator("#compare")).to_be_hidden()
        stage.engine.may_end.set()
        run(page)


def test_a_run_can_be_cancelled_while_its_pictures_are_sent(browser, served):
    grain = np.random.default_rng(0).integers(0, 256, PICTURES["person"].shape, np.uint8)
    with opened(browser, served[0], noise=["stream net::ERR_ABORTED"]) as page:
        choose(page, "person", PERSON)
        choose(page, "upper", png(grain))
        expect(page.locator("#mask-tag")).to_contain_text("Automatic")
        network = page.context.new_cdp_session(page)
        slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 20_000}
        network.send("Network.emulateNetworkConditions", slow)
        page.get_by_role("button", name="Try it on").click()
        expect(page.locator("#elapsed")).to_have_text(re.compile("^[1-9]"))
        expect(page.locator("#progress-text")).to_have_text("Sending the pictures")
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#announce")).to_have_text("Cancelled.")
        expect(page.get_by_role("button", name="Try it on")).to_be_focused()
        assert not [text for text in page.locator(".error").all_inner_texts() if text]
        expect(page.locator("#retry")).to_be_hidden()
        network.send("Network.emulateNetworkConditions", {**slow, "uploadThroughput": -1})
        run(page)


# --- the mask


def test_strokes_are_undone_cleared_and_reset(page):
    use_example(page)
    automatic = saved(page, "#save-mask")
    expect(page.locator("#undo")).to_be_disabled()
    expect(page.locator("#reset")).to_be_disabled()
    paint(page, (0.1, 0.1), (0.9, 0.1))
    painted = saved(page, "#save-mask")
    page.locator("#clear").click()
    assert covered(page) == 0
    page.locator("#undo").click()
    assert saved(page, "#save-mask") == painted != automatic
    page.locator("#reset").click()
    expect(page.locator("#mask-tag")).to_contain_text("Automatic")
    assert saved(page, "#save-mask") == automatic
    page.locator("#undo").click()
    page.locator("#undo").click()
    expect(page.locator("#undo")).to_be_disabled()
    assert saved(page, "#save-mask") == automatic


def test_another_type_brings_its_own_mask_and_undo_brings_the_painted_one_back(page):
    use_example(page)
    paint(page, (0.1, 0.1), (0.9, 0.1))
    painted = saved(page, "#save-mask")
    page.get_by_label("Lower").check(force=True)
    expect(page.locator("#mask-tag")).to_contain_text("Automatic")
    page.locator("#undo").click()
    expect(page.locator("#mask-tag")).to_contain_text("Edited")
    assert saved(page, "#save-mask") == painted


def drawn(page):
    """What is tinted, as the canvas has it: HW bool."""
    pixels = page.locator("#mask-canvas").evaluate("canvas => canvas.toDataURL()")
    return np.asarray(Pillow.open(io.BytesIO(base64.b64decode(pixels.partition(",")[2]))))[:, :, 3] >= 128


def assert_tinted_is_repainted(page, url, kind, tag):
    """The tag says what is tinted; a run sends that where it is edited, and else leaves the mask to the service."""
    expect(page.locator("#mask-tag")).to_contain_text(tag)
    tinted, files, fields = drawn(page), example(url, kind), {"cloth_type": kind}
    page.get_by_label("Steps").fill("1")
    run(page)
    assert ("mask_image" in page.locator("#curl-text").text_content()) == (tag == "Edited")
    if tag == "Edited":
        files["mask_image"] = saved(page, "#save-mask")
        assert np.array_equal(tinted, decode_mask(files["mask_image"]) == 255)
    elif tag == "Automatic":
        made = requests.post(f"{url}api/mask", files={"person_image": files["person_image"]}, data=fields, timeout=60)
        assert np.array_equal(tinted, decode_mask(made.content) == 255)
    else:
        assert not tinted.any()
        expect(page.locator("#save-mask")).to_be_disabled()
    assert asked(url, files, num_inference_steps=1, guidance_scale=1, **fields) == (job(page), saved(page, "#download"))


@contextmanager
def failing_masks(page):
    told = {"detail": "The server is busy.", "code": "overloaded", "retryable": True, "request_id": "1"}
    page.route("**/api/mask", lambda route: route.fulfill(status=503, json=told))
    yield
    page.unroute("**/api/mask")


def test_undo_past_a_change_of_type_shows_the_mask_of_the_type_that_is_chosen(page, served):
    use_example(page)
    paint(page, (0.1, 0.1), (0.9, 0.1))
    page.get_by_label("Lower").check(force=True)
    expect(page.locator("#mask-tag")).to_contain_text("Automatic")
    automatic = drawn(page)
    page.locator("#undo").click()
    assert_tinted_is_repainted(page, served[0], "lower", "Edited")
    page.locator("#undo").click()
    assert_tinted_is_repainted(page, served[0], "lower", "Automatic")
    assert np.array_equal(drawn(page), automatic)
    expect(page.locator("#undo")).to_be_disabled()
    expect(page.locator("#reset")).to_be_disabled()


def test_nothing_is_tinted_while_the_mask_of_the_type_is_unknown(browser, served):
    with opened(browser, served[0], noise=["status of 503"]) as page:
        use_example(page)
        with failing_masks(page):
            page.get_by_label("Lower").check(force=True)
            expect(page.locator("#error-mask_image")).to_contain_text("busy")
            assert_tinted_is_repainted(page, served[0], "lower", "No mask yet")
            page.get_by_label("Upper").check(force=True)
            paint(page, (0.1, 0.1), (0.9, 0.1))
            page.get_by_label("Lower").check(force=True)
            expect(page.locator("#error-mask_image")).to_contain_text("busy")
            assert_tinted_is_repainted(page, served[0], "lower", "Edited")
            page.locator("#undo").click()
            assert_tinted_is_repainted(page, served[0], "lower", "No mask yet")
        page.get_by_role("button", name="Make the mask again").click()
        assert_tinted_is_repainted(page, served[0], "lower", "Automatic")


def test_a_stroke_too_old_to_be_undone_stays_an_edit(page, served):
    use_example(page)
    page.locator("#mask-canvas").focus()
    for _ in range(20):
        page.keyboard.press("ArrowDown")
    for _ in range(101):
        page.keyboard.press(" ")
    for _ in range(100):
        page.keyboard.press("Control+z")
    expect(page.locator("#undo")).to_be_disabled()
    assert_tinted_is_repainted(page, served[0], "upper", "Edited")
    page.locator("#reset").click()
    assert_tinted_is_repainted(page, served[0], "upper", "Automatic")


def test_undo_takes_back_the_stroke_that_is_being_painted(page, served):
    use_example(page)
    automatic = drawn(page)
    page.locator("#mask-canvas").focus()
    page.keyboard.down(" ")
    for _ in range(10):
        page.keyboard.press("ArrowDown")
    assert not np.array_equal(drawn(page), automatic)
    expect(page.locator("#mask-tag")).to_contain_text("Edited")
    page.keyboard.press("Control+z")
    assert np.array_equal(drawn(page), automatic)
    page.keyboard.up(" ")
    assert_tinted_is_repainted(page, served[0], "upper", "Automatic")
    expect(page.locator("#undo")).to_be_disabled()


def test_a_finger_paints_on_a_phone(browser, served):
    with opened(browser, served[0], viewport=PHONE, has_touch=True, is_mobile=True, device_scale_factor=2) as page:
        use_example(page)
        page.locator("#clear").click()
        page.locator("#mask-canvas").scroll_into_view_if_needed()
        page.locator("#mask-canvas").tap(position={"x": 80, "y": 80})
        expect(page.locator("#mask-tag")).not_to_contain_text(" 0 %")
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_a_photo_on_its_side_is_masked_upright(page, served):
    turned, file = Pillow.fromarray(PICTURES["person"]).transpose(Pillow.Transpose.ROTATE_90), io.BytesIO()
    exif = Pillow.Exif()
    exif[0x0112] = 6
    turned.save(file, "JPEG", exif=exif, quality=95)
    choose(page, "person", file.getvalue(), "photo.jpg", "image/jpeg")
    expect(page.locator("#mask-tag")).to_contain_text("Automatic")
    assert decode_mask(saved(page, "#save-mask")).shape == PICTURES["person"].shape[:2]


# --- by keys alone


def tab_to(page, name):
    """Presses Tab until that element has the focus."""
    for _ in range(60):
        page.keyboard.press("Tab")
        focused = page.evaluate("[document.activeElement.id, document.activeElement.value ?? '']")
        if name in focused:
            assert page.locator(":focus-visible").count() == 1
            return
    pytest.fail(f"Tab does not reach {name}")


def test_keys_alone_do_all_of_it(page):
    tab_to(page, "examples")
    page.keyboard.press("Enter")
    expect(page.locator("#mask-tag")).to_contain_text("Automatic")
    expect(page.locator("#examples")).to_be_enabled()
    tab_to(page, "upper")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_label("Lower")).to_be_checked()
    expect(page.locator("#mask-wait")).to_be_hidden()
    tab_to(page, "mask-canvas")
    before = covered(page)
    for _ in range(12):
        page.keyboard.press("ArrowUp")
    page.keyboard.press("]")
    page.keyboard.down(" ")
    for _ in range(8):
        page.keyboard.press("ArrowLeft")
    page.keyboard.up(" ")
    expect(page.locator("#mask-tag")).to_contain_text("Edited")
    painted = covered(page)
    assert painted > before
    page.keyboard.press("e")
    expect(page.get_by_label("Erase")).to_be_checked()
    page.keyboard.press(" ")
    page.keyboard.press("Control+z")
    assert covered(page) == painted
    tab_to(page, "num_inference_steps")
    page.keyboard.press("Control+a")
    page.keyboard.type("2")
    tab_to(page, "run")
    page.keyboard.press("Enter")
    expect(page.locator("#compare")).to_be_visible()
    expect(page.locator("#run")).to_be_focused()
    tab_to(page, "slider")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#slider")).to_have_value("51")
    page.keyboard.press("End")
    expect(page.locator("#slider")).to_have_attribute("aria-valuetext", "100 % before, 0 % after")
    page.keyboard.press("Shift+Tab")
    with page.expect_download() as waited:
        page.keyboard.press("Enter")
    assert Path(waited.value.path()).read_bytes().startswith(b"\xff\xd8")


def test_the_slider_shows_the_photo_on_its_left_and_the_result_on_its_right(page):
    use_example(page)
    page.get_by_label("Steps").fill("2")
    page.get_by_label("Format").select_option("png")
    run(page)
    picture = decode(saved(page, "#download")).astype(int)
    box = page.locator("#compare").bounding_box()
    page.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + box["height"] / 2)
    assert 20 <= int(page.locator("#slider").input_value()) <= 30
    page.mouse.move(0, 0)
    shown = np.asarray(
        Pillow.open(io.BytesIO(page.locator("#compare").screenshot())).convert("RGB").resize((768, 1024))
    )
    place = (slice(330, 560), slice(330, 450))  # the top, right of the slider
    differs = {
        name: np.abs(shown[place].astype(int) - other[place]).mean()
        for name, other in (("after", picture), ("before", PICTURES["person"].astype(int)))
    }
    assert differs["after"] < 0.5 * differs["before"]


# --- what is wrong is said where it is wrong


def test_a_file_that_is_no_picture_is_refused_at_its_tile(page):
    choose(page, "person", b"no picture")
    tile = page.get_by_label("Photo of a person")
    expect(page.locator("#error-person")).to_have_text("The image file is damaged or is not an image.")
    expect(tile).to_have_attribute("aria-invalid", "true")
    assert tile.get_attribute("aria-describedby") == "error-person"
    choose(page, "upper", b"GIF89a", "a.gif", "image/gif")
    expect(page.locator("#error-upper")).to_have_text("The image must be a still JPEG, PNG or WebP.")
    choose(page, "person", PERSON)
    expect(page.locator("#error-person")).to_have_text("")


def test_what_only_the_service_sees_is_told_at_the_same_place(browser, served):
    moving, frames = io.BytesIO(), [Pillow.fromarray(PICTURES[name]) for name in ("person", "dress")]
    frames[0].save(moving, "PNG", save_all=True, append_images=frames[1:])
    with opened(browser, served[0], noise=["status of 422"]) as page:
        choose(page, "person", moving.getvalue())
        expect(page.locator("#error-person")).to_have_text("The image must be a still JPEG, PNG or WebP.")
        expect(page.locator("#mask-again")).to_be_hidden()
        choose(page, "person", PERSON)
        choose(page, "upper", moving.getvalue())
        expect(page.locator("#mask-tag")).to_contain_text("Automatic")
        page.get_by_role("button", name="Try it on").click()
        expect(page.locator("#error-upper")).to_have_text("The image must be a still JPEG, PNG or WebP.")


def test_a_photo_of_nobody_can_be_masked_by_hand(browser, served):
    with opened(browser, served[0], noise=["status of 422"]) as page:
        choose(page, "person", png(np.full((256, 192, 3), 200, np.uint8)))
        choose(page, "upper", UPPER)
        expect(page.locator("#error-mask_image")).to_contain_text("No person was found in the photo.")
        paint(page, (0.3, 0.5), (0.7, 0.5))
        page.get_by_label("Steps").fill("2")
        run(page)
        assert page.locator("#facts dd").nth(1).inner_text() == "edited"


def test_what_is_missing_or_out_of_range_is_told_where_it_is(page):
    page.get_by_role("button", name="Try it on").click()
    for name in ("person", "upper"):
        expect(page.locator(f"#error-{name}")).to_have_text("This picture is needed.")
    expect(page.get_by_label("Photo of a person")).to_be_focused()
    use_example(page)
    for label, name, value in (
        ("Steps", "num_inference_steps", "101"),
        ("Guidance", "guidance_scale", "0.5"),
        ("Seed", "seed", "9223372036854775808"),
    ):
        page.get_by_label(label, exact=True).fill(value)
        page.get_by_role("button", name="Try it on").click()
        expect(page.locator(f"#error-{name}")).not_to_have_text("")
        expect(page.locator(f"#{name}")).to_be_focused()
        page.locator(f"#{name}").fill("5")
        expect(page.locator(f"#error-{name}")).to_have_text("")


def test_a_busy_service_says_when_to_come_back(browser, tmp_path):
    with ExitStack() as stack:
        stage = stack.enter_context(stand_in(tmp_path, max_in_flight=1))
        pool = stack.enter_context(ThreadPoolExecutor(1))
        page = stack.enter_context(opened(browser, f"{stage.url}/", noise=["status of 503"]))
        use_example(page)
        stage.engine.may_end.clear()
        other = pool.submit(stage.plain)
        assert stage.engine.begun.wait(10)
        page.get_by_label("Lower").check(force=True)
        expect(page.locator("#error-mask_image")).to_contain_text("busy")
        page.get_by_role("button", name="Try it on").click()
        expect(page.locator("#error-run")).to_contain_text("busy")
        expect(page.locator("#retry")).to_have_text("Trying again may help now.")
        stage.engine.may_end.set()
        assert other.result(30).status_code == 200
        run(page)
        expect(page.locator("#error-run")).to_have_text("")
        expect(page.locator("#retry")).to_be_hidden()


def test_a_failure_in_the_middle_is_told_and_may_be_tried_again(browser, tmp_path):
    with stand_in(tmp_path) as stage, opened(browser, f"{stage.url}/") as page:
        use_example(page)
        stage.engine.failures.append(OutOfMemory("CUDA out of memory"))
        page.get_by_role("button", name="Try it on").click()
        expect(page.locator("#error-run")).to_contain_text("GPU out of memory.")
        expect(page.locator("#retry")).to_have_text("Trying again may help now.")
        run(page)


def test_a_service_with_keys_asks_for_one(browser, tmp_path):
    key = "k" * 16
    with ExitStack() as stack:
        stage = stack.enter_context(stand_in(tmp_path, api_keys=(key,)))
        page = stack.enter_context(opened(browser, f"{stage.url}/", noise=["status of 401", "status of 403"]))
        page.get_by_role("button", name="Use example pictures").click()
        expect(page.locator("#error-api-key")).to_contain_text("A valid API key is needed.")
        page.get_by_label("API key").fill("m" * 16)
        page.get_by_role("button", name="Make the mask again").click()
        expect(page.locator("#error-api-key")).to_contain_text("This key may not do that.")
        page.get_by_label("API key").fill(key)
        page.get_by_label("API key").press("Tab")
        expect(page.locator("#mask-tag")).to_contain_text("Automatic")
        run(page)
        command = page.locator("#curl-text").text_content()
        assert key not in command
        environ = environment(VTON_API_KEY=key)
        done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environ, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "result.jpg").read_bytes() == saved(page, "#download")


def until(happened, limit_s=30):
    ends = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_a_model_that_loads_is_waited_for(browser, tmp_path):
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    command = [VTON, "demo", "--web", "--no-browser", "--port", str(port)]
    context = browser.new_context(viewport=DESK)
    with (tmp_path / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=log)
    try:
        until(lambda: listens(url))
        page = context.new_page()
        page.goto(url)
        choose(page, "person", PERSON)
        choose(page, "upper", UPPER)
        if page.locator("#health").get_attribute("data-state") == "loading":
            page.get_by_role("button", name="Try it on").click()
        expect(page.locator("#mask-tag")).to_contain_text("Automatic")
        page.get_by_label("Steps").fill("2")
        run(page)
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
        page.get_by_role("button", name="Try it on").click()
        expect(page.locator("#error-run")).not_to_have_text("")
        expect(page.locator("#health")).to_have_attribute("data-state", "unreachable")
    finally:
        context.close()
        process.kill()
        process.wait()


# --- how it looks, and to whom it speaks

NAMELESS = """() => [...document.querySelectorAll("input, select, button, a[href], canvas, summary, progress")]
    .filter((each) => !(each.labels?.length || each.getAttribute("aria-label") || each.getAttribute("aria-labelledby")
        || (/^(BUTTON|A|SUMMARY)$/.test(each.tagName) && each.textContent.trim())))
    .map((each) => each.outerHTML)"""
DANGLING = """() => [...document.querySelectorAll("[aria-describedby], [aria-labelledby], label[for]")]
    .flatMap((each) => ["aria-describedby", "aria-labelledby", "for"].flatMap((name) =>
        (each.getAttribute(name) ?? "").split(" ").filter((id) => id && !document.getElementById(id))))"""
REPEATED = """() => [...document.querySelectorAll("[id]")].map((each) => each.id)
    .filter((id, place, all) => all.indexOf(id) !== place)"""
CONTRAST = """() => {
    const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [...n.slice(0, 3), n[3] ?? 1]; };
    const light = (color) => { const [r, g, b] = color.map((c) => { const s = c / 255;
        return s <= 0.04045 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4; });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const ground = (element) => { for (let each = element; each; each = each.parentElement) {
        const color = parse(getComputedStyle(each).backgroundColor); if (color[3] > 0.9) return color; }
        return [255, 255, 255, 1]; };
    const poor = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        const text = walker.currentNode.textContent.trim();
        if (!text || !element.checkVisibility() || element.closest(":disabled, .corner")) continue;
        const [a, b] = [parse(getComputedStyle(element).color), ground(element)].map((c) => light(c.slice(0, 3)));
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < 4.5) poor.push(`${ratio.toFixed(2)} ${text}`);
    }
    return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_chosen_is_told_from_the_rest_in_forced_colours(browser, served, scheme):
    with opened(browser, served[0], forced_colors="active", color_scheme=scheme) as page:
        page.get_by_label("Lower").check(force=True)
        for name in ("backgroundColor", "color"):
            look = f"[...document.querySelectorAll('#cloth-type span')].map((each) => getComputedStyle(each).{name})"
            upper, lower, *others = page.evaluate(look)
            assert {upper} == set(others) != {lower}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESK, PHONE, NARROW], ids=["desk", "phone", "narrow"])
def test_each_state_is_named_legible_and_fits(browser, served, tmp_path, scheme, viewport):
    with opened(browser, served[0], viewport=viewport, color_scheme=scheme, reduced_motion="reduce") as page:

        def holds(state):
            assert page.evaluate(NAMELESS) == page.evaluate(DANGLING) == page.evaluate(REPEATED) == []
            assert page.evaluate(CONTRAST) == []
            assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
            page.evaluate("scrollTo(0, 0)")
            path = tmp_path / f"{state}.png"
            page.screenshot(path=path, full_page=True)
            with Pillow.open(path) as shot:
                assert shot.width == viewport["width"]
                assert len(shot.convert("RGB").getcolors(2**24)) > 20
            moving = "document.getAnimations().filter((each) => each.playState === 'running').length"
            assert page.evaluate(moving) == 0

        holds("empty")
        page.get_by_role("button", name="Try it on").click()
        holds("error")
        page.get_by_label("Overall").check(force=True)
        use_example(page)
        expect(page.locator("#mask-wait")).to_be_hidden()
        holds("mask")
        page.get_by_label("Steps").fill("2")
        run(page)
        for name in ("#curl", "#boto3"):
            page.locator(f"{name} summary").click()
        holds("result")


def test_the_copied_text_is_the_one_that_is_shown(browser, served):
    with opened(browser, served[0], permissions=["clipboard-read", "clipboard-write"]) as page:
        use_example(page)
        for name in ("curl", "boto3"):
            page.locator(f"#{name} summary").click()
            page.locator(f"#{name} button").click()
            expect(page.locator("#copied")).to_have_text("Copied.")
            assert page.evaluate("navigator.clipboard.readText()") == page.locator(f"#{name}-text").text_content()


def test_a_picture_is_dropped_or_pasted(page):
    give = """([kind, selector, bytes]) => {
        const files = new DataTransfer();
        files.items.add(new File([Uint8Array.from(bytes)], "given.png", { type: "image/png" }));
        const target = document.querySelector(selector);
        target.dispatchEvent(kind === "drop"
            ? new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true })
            : new ClipboardEvent("paste", { clipboardData: files, bubbles: true, cancelable: true }));
    }"""
    small = png(np.asarray(Pillow.fromarray(PICTURES["person"]).resize((192, 256))))
    page.evaluate(give, ["drop", "[data-picture=upper] .drop", list(small)])
    expect(page.locator("[data-picture=upper] .tile-hint")).to_have_text("given.png")
    page.evaluate(give, ["paste", "body", list(small)])
    expect(page.locator("[data-picture=person] .tile-hint")).to_have_text("given.png")
    expect(page.locator("#mask-tag")).to_contain_text("Automatic")
    page.get_by_role("button", name="Remove: photo").click()
    expect(page.locator("#mask-empty")).to_be_visible()
    expect(page.get_by_label("Photo of a person")).to_be_focused()
