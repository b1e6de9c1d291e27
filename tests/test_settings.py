from __future__ import annotations

from pathlib import Path

import pytest

from container.settings import Settings, SettingsError

REFUSED = {
    "VTON_BUKET": "results",
    "VTON_": "x",
    "VTON_bucket": "results",
    "VTON_STEPS": "0",
    "VTON_GUIDANCE": "0.5",
    "VTON_QUALITY": "best",
    "VTON_DEADLINE_S": "-1",
    "VTON_MAX_IN_FLIGHT": "-8",
    "VTON_PORT": "65536",
    "VTON_LOG_LEVEL": "LOUD",
    "VTON_DEVICE": "tpu",
    "VTON_DTYPE": "int8",
    "VTON_TF32": "perhaps",
    "VTON_COMPILE": "max",
    "VTON_MEMORY": "tiny",
    "VTON_GARMENT_JOIN": "glue",
    "VTON_BUCKET": "Not_A_Bucket",
    "VTON_KEY_PREFIX": "../",
    "VTON_QUEUE_URL": "not a url",
    "VTON_MASK_QUEUE_URL": "not a url",
    "VTON_MASKER": "other",
    "VTON_MAX_BATCH": "17",
    "VTON_LOG_SALT": "too short",
    "VTON_WEIGHTS": "",
    "VTON_IMAGE_HOSTS": "https://shop.example",
    "VTON_TRUSTED_HOSTS": "shop.example",
    "VTON_DOCS": "often",
    "VTON_METRICS_NAMESPACE": "AWS/SageMaker",
    "VTON_REST": "perhaps",
    "VTON_API_KEYS": "short",
    "VTON_RATE_LIMIT": "often",
    "VTON_CORS_ORIGINS": "*",
    "VTON_WIDTH": "700",
    "VTON_HEIGHT": "4096",
    "VTON_HOST": "not a host",
    "NUM_STEP": "abc",
    "SAGEMAKER_BIND_TO_PORT": "0",
    "SAGEMAKER_CONTAINER_LOG_LEVEL": "LOUD",
}
OUT_OF_RANGE = [
    ("VTON_METRICS_NAMESPACE", ""),
    ("VTON_METRICS_NAMESPACE", "with space"),
    ("VTON_STEPS", "101"),
    ("VTON_STEPS", "abc"),
    ("VTON_STEPS", "2.5"),
    ("VTON_GUIDANCE", "10.5"),
    ("VTON_GUIDANCE", "nan"),
    ("VTON_DEADLINE_S", "0"),
    ("VTON_DEADLINE_S", "3601"),
    ("VTON_DEADLINE_S", "inf"),
    ("VTON_MAX_IN_FLIGHT", "0"),
    ("VTON_PORT", "0"),
    ("VTON_BUCKET", ""),
    ("VTON_BUCKET", "results\n"),
    ("VTON_KEY_PREFIX", "/"),
    ("VTON_KEY_PREFIX", "results"),
    ("VTON_KEY_PREFIX", "a//"),
    ("VTON_IMAGE_HOSTS", "*"),
    ("VTON_IMAGE_HOSTS", "*.*.example"),
    ("VTON_IMAGE_HOSTS", "shop.example:0x50"),
    ("VTON_IMAGE_HOSTS", "shop.example/path"),
    ("VTON_TRUSTED_HOSTS", "*.shop.example:8443"),
    ("VTON_TRUSTED_HOSTS", "localhost:9000,minio"),
    ("VTON_TRUSTED_HOSTS", "localhost:99999"),
    ("VTON_IMAGE_HOSTS", "shop.example:0"),
    ("NUM_STEP", "0"),
    ("NUM_STEP", "101"),
    ("SAGEMAKER_BIND_TO_PORT", "http"),
    ("SAGEMAKER_CONTAINER_LOG_LEVEL", "25"),
    ("SAGEMAKER_CONTAINER_LOG_LEVEL", "\u00b2"),
]


@pytest.mark.parametrize(("name", "value"), [*REFUSED.items(), *OUT_OF_RANGE])
def test_an_unknown_or_wrong_variable_is_refused_by_name(name, value):
    with pytest.raises(SettingsError, match=rf"\b{name}\b"):
        Settings.from_env({name: value})


def test_the_corpus_has_a_wrong_value_of_every_setting_that_can_be_wrong():
    free = {"engine", "variant", "output_dir"}  # text whose meaning wiring.py checks
    tried = {name[len("VTON_") :].lower() for name in REFUSED if name.startswith("VTON_")}
    assert Settings.model_fields.keys() - free <= tried


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("VTON_STEPS", "101", "less than or equal to 100"),
        ("NUM_STEP", "0", "greater than or equal to 1"),
        ("VTON_DEADLINE_S", "3601", "less than or equal to 3600"),
        ("VTON_LOG_LEVEL", "LOUD", "'DEBUG', 'INFO', 'WARNING', 'ERROR' or 'CRITICAL'"),
        ("SAGEMAKER_CONTAINER_LOG_LEVEL", "LOUD", "DEBUG, INFO, WARNING, ERROR, CRITICAL"),
    ],
)
def test_a_refusal_says_what_is_allowed(name, value, sentence):
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({name: value})
    assert sentence in str(caught.value)


@pytest.mark.parametrize("name", sorted(REFUSED.keys() - {"VTON_WEIGHTS"}))
def test_a_refusal_does_not_echo_the_value(name):
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({name: "AKIA secret \u00e9"})
    assert "secret" not in str(caught.value)


def test_every_wrong_variable_is_named_at_once():
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({"VTON_STEPS": "0", "VTON_PORT": "0"})
    assert "VTON_STEPS" in str(caught.value)
    assert "VTON_PORT" in str(caught.value)


def test_an_empty_environment_gives_the_published_defaults():
    found = Settings.from_env({})
    assert (found.steps, found.guidance, found.deadline_s, found.max_in_flight) == (50, 2.5, 55, 8)
    assert (found.port, found.log_level, found.docs) == (8080, "INFO", False)
    assert (found.image_hosts, found.trusted_hosts, found.bucket, found.queue_url) == ((), (), None, None)


def test_every_variable_reaches_its_setting():
    found = Settings.from_env(
        {
            "VTON_WEIGHTS": "/opt/ml/model",
            "VTON_DEVICE": "cpu",
            "VTON_TF32": "false",
            "VTON_BUCKET": "results",
            "VTON_KEY_PREFIX": "shop/a_1/",
            "VTON_QUEUE_URL": "https://sqs.eu-west-1.amazonaws.com/1/done",
            "VTON_DEADLINE_S": "3600",
            "VTON_PORT": "9000",
            "VTON_LOG_LEVEL": "DEBUG",
        }
    )
    assert (found.weights, found.device, found.tf32, found.bucket) == ("/opt/ml/model", "cpu", False, "results")
    assert (found.key_prefix, found.deadline_s, found.port, found.log_level) == ("shop/a_1/", 3600, 9000, "DEBUG")


def test_variables_of_others_are_none_of_our_business():
    assert Settings.from_env({"AWS_REGION": "eu-west-1", "PATH": "/bin", "XVTON_BUCKET": "x"}) == Settings()


def test_the_settings_of_a_process_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Settings().steps = 1


def test_the_deployed_name_of_the_steps_is_read():
    assert Settings.from_env({"NUM_STEP": "15"}).steps == 15


def test_our_own_name_of_the_steps_comes_first():
    assert Settings.from_env({"NUM_STEP": "15", "VTON_STEPS": "20"}).steps == 20


def test_with_both_names_the_wrong_one_is_named():
    with pytest.raises(SettingsError, match=r"^VTON_STEPS: "):
        Settings.from_env({"NUM_STEP": "15", "VTON_STEPS": "abc"})


def test_sagemaker_says_where_to_listen():
    assert Settings.from_env({"SAGEMAKER_BIND_TO_PORT": "8443"}).port == 8443
    assert Settings.from_env({"SAGEMAKER_BIND_TO_PORT": "8443", "VTON_PORT": "80"}).port == 80


@pytest.mark.parametrize(
    ("level", "name"), [("20", "INFO"), ("10", "DEBUG"), ("50", "CRITICAL"), ("info", "INFO"), ("Warning", "WARNING")]
)
def test_sagemakers_log_level_is_read_as_a_name_or_a_number(level, name):
    assert Settings.from_env({"SAGEMAKER_CONTAINER_LOG_LEVEL": level}).log_level == name


@pytest.mark.parametrize("name", ["NUM_STEP", "SAGEMAKER_BIND_TO_PORT", "SAGEMAKER_CONTAINER_LOG_LEVEL"])
def test_an_empty_variable_of_the_platform_counts_as_not_set(name):
    assert Settings.from_env({name: ""}) == Settings()


def test_hosts_are_a_comma_separated_list_in_lower_case():
    found = Settings.from_env({"VTON_IMAGE_HOSTS": "Shop.example, *.cdn.example:8443,,"})
    assert found.image_hosts == ("shop.example", "*.cdn.example:8443")


def test_trusted_hosts_name_their_ports():
    assert Settings.from_env({"VTON_TRUSTED_HOSTS": "127.0.0.1:9000,minio:80"}).trusted_hosts == (
        "127.0.0.1:9000",
        "minio:80",
    )


def test_a_bucket_and_a_directory_exclude_each_other():
    with pytest.raises(SettingsError, match="VTON_BUCKET and VTON_OUTPUT_DIR"):
        Settings.from_env({"VTON_BUCKET": "results", "VTON_OUTPUT_DIR": "/results"})


def test_the_service_needs_a_place_for_results():
    with pytest.raises(SettingsError, match=r"VTON_BUCKET.*VTON_OUTPUT_DIR"):
        Settings().require_a_place_for_results()


@pytest.mark.parametrize("place", [{"bucket": "results"}, {"output_dir": Path("results")}])
def test_a_bucket_or_a_directory_is_a_place_for_results(place):
    found = Settings(**place)
    assert found.require_a_place_for_results() is found
