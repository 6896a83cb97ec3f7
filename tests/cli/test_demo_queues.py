"""The demo on brokers of one's own, and its choice of URLs."""

import json
import re
from contextlib import aclosing

import aws_resources
import pubsub_resources
import pytest
from command import rejoinder

from rejoinder.adapters import Outgoing, memory, open_subscription, open_topic
from rejoinder.cli.demo_queues import own_answers


def answer(number: object, run: str = "own") -> Outgoing:
    return Outgoing(json.dumps({"status_code": 200, "metadata": {"id": number, "run": run}, "body": None}).encode())


async def test_only_the_answers_of_the_run_are_taken():
    url = memory.fresh_url("lease=60")
    others = [answer(1, "other"), Outgoing(b"no JSON"), Outgoing(b"[]"), Outgoing(b'{"metadata":null}'), answer("x")]
    async with open_topic(url.partition("?")[0]) as topic, open_subscription(url) as subscription:
        await topic.publish([*others, answer(1), answer(1), answer(0)])
        async with aclosing(own_answers(url, "own", 2)) as answers:
            assert [json.loads(body)["metadata"]["id"] async for body in answers] == [1, 0]
        left = await subscription.receive(9, 5)
        assert [message.body for message in left] == [one.body for one in others]
        assert [message.attempt for message in left] == [2] * 5


async def test_an_answer_that_was_not_dealt_with_comes_again():
    url = memory.fresh_url("lease=0.2")
    async with open_topic(url.partition("?")[0]) as topic, open_subscription(url) as subscription:
        await topic.publish([answer(0)])
        async with aclosing(own_answers(url, "own", 2)) as answers:
            await anext(answers)
        assert [message.body for message in await subscription.receive(9, 20)] == [answer(0).body]


def refused(cwd, *args: str) -> str:
    done = rejoinder("demo", *args, cwd=cwd)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, b"", 1), done.stderr
    return done.stderr.decode()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--requests", "gcppubsub://projects/local/topics/t"), "--requests: "),
        (("--responses", "memory://x"), "no worker can see it"),
        (("--consume-from", "sqlite:///x.db"), "--consume-from: parameter 'queue' is missing"),
        (("--publish-to", "nothing://x"), "--publish-to: cannot open 'nothing://x': unknown scheme"),
    ],
)
def test_urls_that_cannot_be_are_refused_at_once(args, says, tmp_path):
    assert says in refused(tmp_path, *args)


async def test_where_one_url_is_not_enough_the_other_option_is_named(gcp, aws, tmp_path):
    subscription, topic, _ = await pubsub_resources.make(60)
    assert "name the topic behind it with --publish-to URL" in refused(
        tmp_path, "--requests", f"gcppubsub://{subscription}"
    )
    assert "with --consume-from URL" in refused(tmp_path, "--responses", f"gcppubsub://{topic}")
    queue, _ = await aws_resources.make_queue()
    sns = await aws_resources.make_topic(queue)
    assert "with --consume-from URL" in refused(tmp_path, "--responses", f"awssns:///{sns}")


@pytest.mark.model
@pytest.mark.parametrize("direction", ["aws-to-gcp", "gcp-to-aws"])
async def test_both_clouds_at_once(direction, aws, gcp, tmp_path):
    queue, _ = await aws_resources.make_queue(VisibilityTimeout=60)
    subscription, topic, _ = await pubsub_resources.make(60)
    sqs = f"awssqs:///{aws_resources.name_of(queue)}"
    subscription, topic = f"gcppubsub://{subscription}", f"gcppubsub://{topic}"
    if direction == "aws-to-gcp":
        args, responses = ("--requests", sqs, "--responses", topic, "--consume-from", subscription), topic
    else:
        args, responses = ("--requests", subscription, "--publish-to", topic, "--responses", sqs), sqs
    async with open_topic(responses) as sink:
        await sink.publish([answer(3, "another run")])
    done = rejoinder("demo", *args, cwd=tmp_path, limit=280)
    assert done.returncode == 0, done.stderr.decode()
    summary = done.stdout.decode().splitlines()[-1]
    assert re.fullmatch(r"13 requests, 12 ok, 1 refused \(as intended\), .+, all joined: yes", summary)
    received = subscription if direction == "aws-to-gcp" else sqs
    async with open_subscription(received) as source:
        (left,) = await source.receive(9, 60)
        assert left.body == answer(3, "another run").body
