"""The main job end to end: real boto3, real HTTP, the real process with the embedded model."""

from __future__ import annotations

import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import psutil
import pytest
from botocore.exceptions import ClientError
from PIL import Image as Pillow
from stand_in import box_mask, noise, png, usual_files, usual_request

from container.sandbox import NOBODY
from deploy.demo import BUCKET, ENDPOINT_NAME
from model import geometry
from model.embedded import demo_pictures


def fields(endpoint, **changes):
    urls = {
        name: f"http://{endpoint.images}/{name.split('_')[0]}.png"
        for name in ("person_image_url", "upper_cloth_url", "lower_cloth_url", "mask_image_url")
    }
    return usual_request(**{**urls, **changes})


def invoke(endpoint, request, **members):
    response = endpoint.caller().invoke_endpoint(
        EndpointName=ENDPOINT_NAME, ContentType="application/json", Body=json.dumps(request), **members
    )
    return json.loads(response["Body"].read())


def messages(endpoint, queue_url=None):
    """All messages that are there, taken out of the queue."""
    sqs, queue_url, found = endpoint.cloud.client("sqs"), queue_url or endpoint.cloud.queue_url, []
    while received := sqs.receive_message(QueueUrl=queue_url, MaxNumberOfMessages=10, WaitTimeSeconds=0).get(
        "Messages"
    ):
        for message in received:
            found.append(json.loads(message["Body"]))
            sqs.delete_message(QueueUrl=queue_url, ReceiptHandle=message["ReceiptHandle"])
    return found


def stored(endpoint, key):
    return endpoint.cloud.client("s3").get_object(Bucket=BUCKET, Key=key)


def pixels(content):
    with Pillow.open(io.BytesIO(content)) as picture:
        return np.asarray(picture.convert("RGB"))


def test_a_backend_gets_the_key_of_a_picture_that_keeps_what_is_outside_the_mask(endpoint):
    answer = invoke(endpoint, fields(endpoint, timestamp="e2e-1"), InferenceId="call-1")
    assert answer["object_key"] == "users/7/vton_result/e2e-1/result.png"
    assert (answer["bucket"], answer["engine"]) == (BUCKET, "catvton/embedded")
    found = stored(endpoint, answer["object_key"])
    assert found["Metadata"]["job-id"] == answer["job_id"]
    assert found["ContentType"] == "image/png"
    assert found["ETag"].strip('"') == answer["etag"]
    picture = pixels(found["Body"].read())
    person = np.asarray(geometry.crop_resize(Pillow.fromarray(noise(seed=1)), 768, 1024))
    outside = np.asarray(Pillow.fromarray(box_mask()).resize((768, 1024), Pillow.Resampling.NEAREST)) == 0
    assert np.array_equal(picture[outside], person[outside])
    assert (picture[~outside] != person[~outside]).mean() > 0.9
    (message,) = [message for message in messages(endpoint) if message["initial_timestamp"] == "e2e-1"]
    assert message == {
        "userId": "7",
        "initial_timestamp": "e2e-1",
        "object_key": answer["object_key"],
        "bucket": BUCKET,
        "job_id": answer["job_id"],
        "status": "completed",
        "inference_id": "call-1",
    }


def test_the_deployed_caller_works_unchanged(endpoint):
    s3 = endpoint.cloud.client("s3")
    for name, content in usual_files().items():
        s3.put_object(Bucket=BUCKET, Key=f"users/41/items/closet/{name}", Body=content)

    def presigned(name):
        return s3.generate_presigned_url(
            "get_object", {"Bucket": BUCKET, "Key": f"users/41/items/closet/{name}.png"}, ExpiresIn=3600
        )

    answer = invoke(
        endpoint,
        {
            "userId": "41",
            "timestamp": "241108-230001",
            "person_image_url": presigned("person"),
            "upper_cloth_url": presigned("upper"),
            "lower_cloth_url": presigned("lower"),
            "mask_image_url": presigned("mask"),
            "cloth_type": "overall",
        },
    )
    assert answer["message"] == "VTON run successfully"
    content = stored(endpoint, "users/41/vton_result/241108-230001/result.jpg")["Body"].read()
    with Pillow.open(io.BytesIO(content)) as picture:
        assert (picture.format, picture.size) == ("JPEG", (768, 1024))
    (message,) = [message for message in messages(endpoint) if message["userId"] == "41"]
    assert message["initial_timestamp"] == "241108-230001"
    assert "Signature" not in endpoint.log.read_text()


def test_images_may_be_the_callers_own_objects(endpoint):
    s3 = endpoint.cloud.client("s3")
    s3.put_object(Bucket=BUCKET, Key="users/42/row/t/row.png", Body=usual_files()["person.png"])
    own = f"s3://{BUCKET}/users/42/row/t/row.png"
    assert invoke(endpoint, fields(endpoint, userId="42", person_image_url=own))["width"] == 768
    with pytest.raises(ClientError, match="url_not_permitted"):
        invoke(endpoint, fields(endpoint, userId="43", person_image_url=own))


def figure(endpoint):
    """A drawn person in the bucket, as a URL that the endpoint may fetch."""
    s3 = endpoint.cloud.client("s3")
    s3.put_object(Bucket=BUCKET, Key="users/51/row/t/row.png", Body=png(demo_pictures()["person"]))
    return s3.generate_presigned_url("get_object", {"Bucket": BUCKET, "Key": "users/51/row/t/row.png"}, ExpiresIn=3600)


def test_the_deployed_sign_up_works_unchanged(endpoint):
    answer = invoke(endpoint, {"body": {"username": "51", "row_image_url": figure(endpoint), "timestamp": "sign-up"}})
    assert set(answer["object_keys"]) == {"upper", "lower", "overall", "inner", "outer"}
    for name, key in answer["object_keys"].items():
        assert key == f"users/51/masking/sign-up/{name}.png"
        found = stored(endpoint, key)
        assert found["ContentType"] == "image/png"
        with Pillow.open(io.BytesIO(found["Body"].read())) as mask:
            assert (mask.mode, mask.size) == ("L", (answer["width"], answer["height"]))
            assert mask.getextrema() == (0, 255)
    (message,) = messages(endpoint, endpoint.cloud.mask_queue_url)
    assert (message["username"], message["initial_timestamp"]) == ("51", "sign-up")


def test_a_request_without_a_mask_is_masked_and_the_next_one_of_the_person_from_memory(endpoint):
    before = endpoint.metric("vton_mask_cache_total")
    request = fields(endpoint, userId="51", person_image_url=figure(endpoint), mask_image_url=None)
    first = invoke(endpoint, {**request, "timestamp": "no-mask-1"})
    second = invoke(endpoint, {**request, "timestamp": "no-mask-2", "cloth_type": "lower"})
    assert (first["mask_source"], second["mask_source"], second["mask_cache"]) == ("auto", "auto", "hit")
    assert endpoint.metric("vton_mask_cache_total") == before + 2


def test_a_photo_without_a_person_and_without_a_mask_is_refused(endpoint):
    with pytest.raises(ClientError) as refused:
        invoke(endpoint, fields(endpoint, userId="nobody", mask_image_url=None))
    error = json.loads(refused.value.response["OriginalMessage"])["error"]
    assert (error["code"], error["retryable"]) == ("person_not_found", False)


def decoders():
    """The processes in which the endpoint decodes, without their forks."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a fork ends at any time
            parent = psutil.Process(child.ppid())
            if "container.sandbox" in " ".join(child.cmdline()) and "serve" in " ".join(parent.cmdline()):
                found.append(child)
    return found


def test_pictures_are_decoded_by_processes_without_rights_and_a_dead_one_is_replaced(endpoint):
    found = decoders()
    assert len(found) >= 2
    if os.geteuid() == 0:
        assert all(decoder.uids().effective == NOBODY for decoder in found)
    for decoder in found:
        decoder.kill()
    assert invoke(endpoint, fields(endpoint, timestamp="decoders"))["width"] == 768
    assert {decoder.pid for decoder in decoders()}.isdisjoint(decoder.pid for decoder in found)


def test_a_file_that_is_no_picture_is_refused_and_the_next_request_works(endpoint):
    s3 = endpoint.cloud.client("s3")
    s3.put_object(Bucket=BUCKET, Key="users/61/row/t/row.png", Body=b"\x89PNG\r\n\x1a\nand no more")
    broken = f"s3://{BUCKET}/users/61/row/t/row.png"
    with pytest.raises(ClientError, match="image_not_decodable"):
        invoke(endpoint, fields(endpoint, userId="61", timestamp="broken", person_image_url=broken))
    assert invoke(endpoint, fields(endpoint, userId="61", timestamp="whole"))["width"] == 768


def test_two_equal_requests_give_one_generation_and_the_same_bytes(endpoint):
    request = fields(endpoint, timestamp="twice")
    before = endpoint.metric("vton_generations_total")
    first = invoke(endpoint, request)
    kept = stored(endpoint, first["object_key"])
    second = invoke(endpoint, request)
    assert (second["etag"], second["job_id"]) == (first["etag"], first["job_id"])
    again = stored(endpoint, first["object_key"])
    assert again["LastModified"] == kept["LastModified"]
    assert again["Body"].read() == kept["Body"].read()
    assert endpoint.metric("vton_generations_total") == before + 1


def test_equal_requests_at_the_same_time_give_one_generation(endpoint):
    before = endpoint.metric("vton_generations_total")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: invoke(endpoint, fields(endpoint, timestamp="at-once")), range(4)))
    assert len({answer["etag"] for answer in answers}) == 1
    assert endpoint.metric("vton_generations_total") == before + 1


def test_the_same_inputs_under_another_timestamp_give_the_same_bytes(endpoint):
    keys = [invoke(endpoint, fields(endpoint, timestamp=f"same-{number}"))["object_key"] for number in range(2)]
    first, second = (stored(endpoint, key)["Body"].read() for key in keys)
    assert first == second


def test_another_job_under_the_same_key_is_refused_with_409(endpoint):
    invoke(endpoint, fields(endpoint, timestamp="conflict"))
    with pytest.raises(ClientError) as refused:
        invoke(endpoint, fields(endpoint, timestamp="conflict", seed=7))
    response = refused.value.response
    assert response["Error"]["Code"] == "ModelError"
    assert response["OriginalStatusCode"] == 409
    error = json.loads(response["OriginalMessage"])["error"]
    assert (error["code"], error["retryable"]) == ("job_conflict", False)


def test_what_is_refused_leaves_no_object_and_no_message(endpoint):
    with pytest.raises(ClientError) as refused:
        invoke(endpoint, fields(endpoint, userId="nobody", upper_cloth_url=f"http://{endpoint.images}/gone.png"))
    assert json.loads(refused.value.response["OriginalMessage"])["error"]["code"] == "image_not_found"
    listed = endpoint.cloud.client("s3").list_objects_v2(Bucket=BUCKET, Prefix="users/nobody/")
    assert listed["KeyCount"] == 0
    assert not [message for message in messages(endpoint) if message["userId"] == "nobody"]


def test_every_line_of_the_log_is_json_without_user_ids_or_queries(endpoint):
    invoke(endpoint, fields(endpoint, userId="secret-user", timestamp="log"))
    lines = endpoint.log.read_text().splitlines()
    assert lines
    assert all(isinstance(json.loads(line), dict) for line in lines)
    assert "secret-user" not in endpoint.log.read_text()
    users = [json.loads(line)["user"] for line in lines if json.loads(line)["event"] == "request_done"]
    assert users
    assert all(len(user) == 16 for user in users)
