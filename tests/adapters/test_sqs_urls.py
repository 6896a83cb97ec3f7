"""URLs of SQS and SNS: what is refused, what the refusal names, and what each of them means."""

import os
from contextlib import AsyncExitStack

import pytest
from aws_stand_in import ARN, TOPIC, bare_environment

from rejoinder.adapters import BadURL, Denied, Transient, open_subscription, open_topic, sqs
from rejoinder.adapters.aws import Vendor

REFUSED = [
    ("awssqs://q", "awssqs:///QUEUE"),
    ("awssqs:///", "awssqs:///QUEUE"),
    ("awssqs:///a/b", "awssqs:///QUEUE"),
    ("awssqs:///q.fifo.fifo", "awssqs:///QUEUE"),
    ("awssqs:///q%20x", "awssqs:///QUEUE"),
    ("awssqs:///" + "q" * 81, "awssqs:///QUEUE"),
    ("awssqs://sqs.us-east-1.amazonaws.com/q", "awssqs:///QUEUE"),
    ("awssqs://sqs.us-east-1.amazonaws.com/1234/q", "12 digits"),
    ("awssqs://localhost:4566/000000000000/q", "AWS_ENDPOINT_URL_SQS"),
    ("awssqs://sqs.us-east-1.amazonaws.com/000000000000/q?region=eu-west-1", "'region' is 'eu-west-1'"),
    ("awssqs:///q?lease=0", "'lease'"),
    ("awssqs:///q?lease=43201", "'lease'"),
    ("awssqs:///q?lease=1.5", "'lease'"),
    ("awssqs:///q?wait=1", "'wait'"),
    ("awssqs:///q#f", "fragment"),
    ("awssns://arn:aws:sns:us-east-1:000000000000:t", "three slashes"),
    ("awssns:///t", "ARN|arn"),
    ("awssns:///arn:aws:sqs:us-east-1:000000000000:t", "arn:aws:sns"),
    (f"awssns:///{TOPIC}?region=eu-west-1", "'region' is 'eu-west-1'"),
    (f"awssns:///{TOPIC}?lease=3", "'lease'"),
]


@pytest.mark.parametrize("opener", [open_subscription, open_topic])
@pytest.mark.parametrize(("url", "named"), REFUSED)
async def test_refused_by_name(opener, url, named):
    with pytest.raises(BadURL, match=named):
        async with opener(url):
            pass


@pytest.mark.parametrize(
    ("url", "queue_url", "region"),
    [
        (
            "awssqs://sqs.us-east-1.amazonaws.com/000000000000/q",
            "https://sqs.us-east-1.amazonaws.com/000000000000/q",
            "us-east-1",
        ),
        (
            "awssqs://sqs.cn-north-1.amazonaws.com.cn/000000000000/q.fifo?region=cn-north-1",
            "https://sqs.cn-north-1.amazonaws.com.cn/000000000000/q.fifo",
            "cn-north-1",
        ),
        (
            "awssqs://sqs-fips.us-gov-west-1.amazonaws.com/000000000000/q",
            "https://sqs-fips.us-gov-west-1.amazonaws.com/000000000000/q",
            "us-gov-west-1",
        ),
        ("awssqs:///q?region=eu-west-1", None, "eu-west-1"),
        ("awssqs:///q", None, None),
    ],
)
def test_what_a_url_means(url, queue_url, region):
    place = sqs.Place.parse(url)
    assert (place.queue_url, place.region) == (queue_url, region)


@pytest.mark.parametrize(("host", "fips"), [("sqs", None), ("sqs-fips", None), ("sqs", "true")])
async def test_a_fips_host_is_the_one_that_is_called(monkeypatch, tmp_path, host, fips):
    bare_environment(monkeypatch, tmp_path)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    if fips:
        monkeypatch.setenv("AWS_USE_FIPS_ENDPOINT", fips)
    place = sqs.Place.parse(f"awssqs://{host}.us-east-1.amazonaws.com/000000000000/q")
    async with AsyncExitStack() as stack:
        vendor = Vendor(place.url, place.region, stack, fips=place.fips)

        async def endpoint(client):
            return client.meta.endpoint_url

        called = await (await vendor.connect("sqs", sqs.SENDING)).run("sqs:SendMessage", place.name, endpoint)
    assert called == f"https://{'sqs-fips' if fips else host}.us-east-1.amazonaws.com"


async def test_no_region(monkeypatch, tmp_path):
    bare_environment(monkeypatch, tmp_path)
    with pytest.raises(BadURL, match=r"\?region=REGION"):
        async with open_topic("awssqs:///q"):
            pass


@pytest.mark.parametrize("url", ["awssqs:///q?region=us-east-1", f"awssns:///{TOPIC}"])
async def test_no_credentials(monkeypatch, tmp_path, url):
    bare_environment(monkeypatch, tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(Denied, match=r"(?i)credentials"):
        async with open_topic(url):
            pass


async def test_half_of_the_credentials(monkeypatch, tmp_path):
    bare_environment(monkeypatch, tmp_path)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    with pytest.raises(Denied, match="PartialCredentials"):
        async with open_topic("awssqs:///q?region=us-east-1"):
            pass


async def test_a_profile_that_is_not_there(monkeypatch, tmp_path):
    bare_environment(monkeypatch, tmp_path)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(Denied, match="nobody"):
        async with open_topic("awssqs:///q"):
            pass


async def test_region_and_keys_of_a_profile(monkeypatch, tmp_path, stand_in):
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION"):
        monkeypatch.delenv(f"AWS_{name}")
    (tmp_path / "config").write_text("[profile p]\nregion=eu-central-1\naws_access_key_id=a\naws_secret_access_key=b\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "p")
    async with open_topic("awssqs:///q") as topic:
        assert topic.name == ARN


async def test_an_endpoint_of_its_own(monkeypatch, stand_in):
    monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    async with open_topic("awssqs:///q") as topic:
        assert topic.name == ARN
    with pytest.raises(Transient, match=r"127\.0\.0\.1:1"):
        async with open_topic(f"awssns:///{TOPIC}"):
            pass


async def test_an_endpoint_that_is_none(monkeypatch, stand_in):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(BadURL, match="AWS_ENDPOINT_URL"):
        async with open_topic("awssqs:///q"):
            pass


async def test_a_topic_cannot_be_received_from():
    with pytest.raises(BadURL, match="subscribe an SQS queue"):
        async with open_subscription(f"awssns:///{TOPIC}"):
            pass
