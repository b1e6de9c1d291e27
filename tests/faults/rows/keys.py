"""keys_and_idempotency: a key is the caller's own, and a job is made once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from ..pictures import pixels_of
from ..registry import row
from ..stage import Stage
from .http import refuses_field

AT_ONCE = 8


@row("K01")
def user_ids_that_climb(stage: Stage) -> None:
    """No key and no file is made."""
    with stage.nothing_happens(stage.service):
        for value in ("../../etc", "a/b", "a\\b", "a\\\\b", ".", "..", "", "u" * 65, "-u", "u\n"):
            refuses_field(stage, "userId", value)


@row("K03")
def timestamps_that_climb(stage: Stage) -> None:
    """No key and no file is made."""
    with stage.nothing_happens(stage.service):
        for value in ("../x", "240901-000000/../../y", "t" * 10_000, "\u0662\u0664\u0660\u0669\u0660\u0661"):
            refuses_field(stage, "timestamp", value)


@row("K05")
def one_after_the_other(stage: Stage) -> str:
    """The second finds the first one's picture."""
    service, fields = stage.service, stage.fields()
    first = stage.post(service, fields).done()
    made = service.generations()
    second = stage.post(service, fields).done()
    same = ("object_key", "etag", "job_id", "seed")
    assert [first[name] for name in same] == [second[name] for name in same]
    assert service.generations() == made, "the engine ran again"
    sent = stage.messages(first["job_id"])
    assert 1 <= len(sent) <= 2, f"{len(sent)} messages"
    return f"{len(sent)} messages with the one job id"


@row("K06")
def at_the_same_time(stage: Stage) -> str:
    """One picture is made, and all who are answered get it."""
    service, fields = stage.service, stage.fields(output_format="png")
    made = service.generations()
    with service.pace(0.3), ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda _: stage.post(service, fields), range(AT_ONCE)))
    statuses = [answer.status for answer in answers]
    assert set(statuses) <= {200, 409, 429}, statuses
    done = [answer.json() for answer in answers if answer.status == 200]
    assert done, statuses
    assert len({answer["etag"] for answer in done}) == 1
    assert service.generations() == made + 1, f"{service.generations() - made} pictures were made"
    (key,) = stage.keys(f"users/{stage.row.lower()}/vton_result/{fields['timestamp']}/")
    assert pixels_of(stage.stored(key)).shape == (1024, 768, 3)
    return f"answers {sorted(statuses)}"
