"""Small real implementations of the service's ports, for tests of what is built on them."""

from __future__ import annotations

import atexit
import io
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image as Pillow

from container.decoder import ProcessDecoder
from container.errors import ImageNotFound
from container.request import CLOTH_TYPES
from container.settings import Settings
from container.storage import LocalStorage
from container.wiring import Ports, assemble
from container.worker import Models


def png(array):
    """The bytes of a PNG file with these pixels."""
    file = io.BytesIO()
    Pillow.fromarray(array).save(file, "PNG")
    return file.getvalue()


def noise(height=256, width=192, seed=0):
    """HWC uint8 pixels of a seed."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def box_mask(height=256, width=192):
    """HW uint8: 255 in the middle half, 0 around it."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 255
    return mask


def usual_files():
    """One picture for each role, as PNG bytes."""
    return {
        "person.png": png(noise(seed=1)),
        "upper.png": png(noise(200, 100, seed=2)),
        "lower.png": png(noise(100, 100, seed=3)),
        "mask.png": png(box_mask()),
    }


def usual_request(**changes):
    """The fields of a good request; a change to None takes the field away."""
    fields = {
        "person_image_url": "https://images.example/person.png",
        "upper_cloth_url": "https://images.example/upper.png",
        "lower_cloth_url": "https://images.example/lower.png",
        "mask_image_url": "https://images.example/mask.png",
        "cloth_type": "overall",
        "userId": "7",
        "timestamp": "241108-230001",
        "output_format": "png",
        **changes,
    }
    return {name: value for name, value in fields.items() if value is not None}


class FakeFetcher:
    """Files by the last part of their URL; remembers what was asked for."""

    def __init__(self, files=None):
        self.files = usual_files() if files is None else files
        self.asked = []

    def fetch(self, ref, *, user_id, deadline):
        self.asked.append(ref)
        name = ref.rpartition("/")[2].partition("?")[0]
        if name not in self.files:
            raise ImageNotFound(name)
        return self.files[name]


class RecordingNotifier:
    """Keeps the messages; fails as often as told."""

    def __init__(self):
        self.events = []
        self.failures = []

    def send(self, event):
        if self.failures:
            raise self.failures.pop()
        self.events.append(event)


class StandInEngine:
    """Paints one colour that depends on the seed, after waiting as long as told; counts its pictures."""

    name = "stand-in"

    def __init__(self, seconds=0.0):
        self.seconds = seconds
        self.made = []
        self.batches = []
        self.failures = []
        self.begun = threading.Event()
        self.may_end = threading.Event()
        self.may_end.set()

    def generate(self, inputs, settings):
        self.begun.set()
        time.sleep(self.seconds)
        self.may_end.wait(60)
        if self.failures:
            raise self.failures.pop()
        self.made.append(settings)
        picture = np.empty((settings.height, settings.width, 3), np.uint8)
        picture[:] = np.random.default_rng(settings.seed).integers(0, 256, 3)
        return picture

    def generate_batch(self, inputs, settings):
        self.batches.append(len(inputs))
        return [self.generate(*each) for each in zip(inputs, settings)]


class StandInMasker:
    """Masks another part of the picture for each type; counts the pictures that it looked at."""

    def __init__(self):
        self.seen = []
        self.failures = []

    def mask(self, person, cloth_type):
        return self.masks(person, [cloth_type])[cloth_type]

    def masks(self, person, cloth_types):
        self.seen.append(person)
        if self.failures:
            raise self.failures.pop()
        height, width = person.shape[:2]
        made = {}
        for name in cloth_types:
            made[name] = np.zeros((height, width), np.uint8)
            made[name][height // 4 : height // 4 + (1 + CLOTH_TYPES.index(name)) * height // 10] = 255
        return made


class SharedDecoder:
    """The real decoder, one for all tests: its processes start with the first picture and end with the tests."""

    def __init__(self):
        self._decoder = None
        self._lock = threading.Lock()

    def start(self):
        with self._lock:
            if self._decoder is None:
                self._decoder = ProcessDecoder(2)
                self._decoder.start()
                atexit.register(self._decoder.stop, 5)

    def stop(self, timeout_s):
        pass

    def decode(self, content, deadline):
        return self._decoder.decode(content, deadline)

    def decode_mask(self, content, deadline):
        return self._decoder.decode_mask(content, deadline)


DECODER = SharedDecoder()


@contextmanager
def running_app(
    tmp_path: Path,
    *,
    engine=None,
    masker=None,
    fetcher=None,
    decoder=DECODER,
    notifier=None,
    mask_notifier=None,
    storage=None,
    **settings,
):
    """A wired service with a warm stand-in engine, results in `tmp_path`; without a masker unless one is given."""
    engine = engine or StandInEngine()
    notifier = notifier or RecordingNotifier()
    ports = Ports(
        fetcher=fetcher or FakeFetcher(),
        decoder=decoder,
        storage=storage or LocalStorage(tmp_path),
        notifier=notifier,
        mask_notifier=mask_notifier or notifier,
    )
    models = Models(engine, masker)
    app = assemble(Settings(output_dir=tmp_path, **settings), ports, lambda: models, lambda _models: None)
    app.start()
    assert app.worker.wait_until_loaded(30)
    try:
        yield app
    finally:
        engine.may_end.set()
        app.stop(5)
