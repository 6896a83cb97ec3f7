"""The fixtures bring up what they say, and the environment names it."""

import os
import urllib.request

import grpc


def test_localstack_answers_where_the_environment_says(aws: str) -> None:
    assert os.environ["AWS_ENDPOINT_URL"] == aws
    with urllib.request.urlopen(f"{aws}/_localstack/health", timeout=10) as answer:
        assert answer.status == 200


def test_the_emulator_answers_where_the_environment_says(gcp: str) -> None:
    assert os.environ["PUBSUB_EMULATOR_HOST"] == gcp
    with grpc.insecure_channel(gcp) as channel:
        grpc.channel_ready_future(channel).result(timeout=10)
