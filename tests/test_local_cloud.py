"""The parts of a cloud that stand on this machine."""

from __future__ import annotations

import os
from urllib.request import proxy_bypass_environment

import boto3
import pytest

from deploy.local_cloud import REGION, moto_server, reach_this_machine

PROXY = "http://127.0.0.1:9"
BOTH = "127.0.0.1,localhost"
KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": REGION}


@pytest.fixture
def clean(monkeypatch):
    """An environment without proxies and settings of AWS, and what sets some in it."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("AWS_")]:
        monkeypatch.delenv(name)

    def given(environ):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("os.environ", os.environ.copy())  # for what is set below to go with the test
        return os.environ

    return given


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, (BOTH, BOTH)),
        ({"NO_PROXY": "shop.example"}, (f"shop.example,{BOTH}", f"shop.example,{BOTH}")),
        ({"no_proxy": "shop.example"}, (f"shop.example,{BOTH}", f"shop.example,{BOTH}")),
        ({"NO_PROXY": "a.example", "no_proxy": "b.example"}, (f"a.example,{BOTH}", f"b.example,{BOTH}")),
        ({"NO_PROXY": "a.example", "no_proxy": ""}, (f"a.example,{BOTH}", BOTH)),
        ({"no_proxy": "localhost, a.example"}, ("localhost, a.example,127.0.0.1",) * 2),
        ({"no_proxy": "*"}, ("*", "*")),
    ],
)
def test_this_machine_is_called_directly_and_what_the_user_excepts_stays(clean, before, after):
    environ = clean({"HTTP_PROXY": PROXY, **before})
    for _ in range(2):
        reach_this_machine(environ)
        assert (environ["NO_PROXY"], environ["no_proxy"]) == after
    for name in ("127.0.0.1:8081", "localhost", *filter(None, before.get("no_proxy", "").split(", "))):
        assert proxy_bypass_environment(name)


@pytest.mark.parametrize("said", ["environment", "profile"])
def test_boto3_calls_the_url_that_is_named_though_it_was_told_to_ignore_it(clean, tmp_path, said):
    (tmp_path / "config").write_text("[default]\nignore_configured_endpoint_urls = true\n")
    told = {
        "environment": {"AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"},
        "profile": {"AWS_CONFIG_FILE": str(tmp_path / "config")},
    }
    with moto_server() as url:
        environ = clean({**KEYS, **told[said], "AWS_ENDPOINT_URL_SQS": url, "HTTP_PROXY": PROXY})
        reach_this_machine(environ)
        sqs = boto3.session.Session().client("sqs")
        assert sqs.meta.endpoint_url == url
        assert sqs.list_queues()["ResponseMetadata"]["HTTPStatusCode"] == 200
