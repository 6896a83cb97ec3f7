"""What the services and the network answer besides success, and what becomes of it."""

import asyncio

import pytest
from aws_stand_in import ATTRIBUTES, TOPIC, Refusal, failing, received

from rejoinder.adapters import (
    AdapterError,
    BadURL,
    Denied,
    LeaseLost,
    NotFound,
    Outgoing,
    TooLarge,
    Transient,
    open_subscription,
    open_topic,
    sns,
    sqs_subscription,
)

QUEUE = "awssqs:///q"
SNS = f"awssns:///{TOPIC}"


def refuse(*args):
    def handler(_fields):
        raise Refusal(*args)

    return handler


CODES = [
    ("AccessDenied", 403, Denied),
    ("AccessDeniedException", 400, Denied),
    ("AuthorizationError", 403, Denied),
    ("InvalidClientTokenId", 403, Denied),
    ("SignatureDoesNotMatch", 403, Denied),
    ("ExpiredToken", 403, Denied),
    ("ExpiredTokenException", 400, Denied),
    ("UnrecognizedClientException", 400, Denied),
    ("InvalidSecurity", 403, Denied),
    ("KmsAccessDenied", 400, Denied),
    ("KMSAccessDenied", 400, Denied),
    ("KMSDisabled", 400, Denied),
    ("SomethingNew", 403, Denied),
    ("RequestTimeTooSkewed", 403, Transient),
    ("RequestExpired", 400, Transient),
    ("AWS.SimpleQueueService.NonExistentQueue", 400, NotFound),
    ("QueueDoesNotExist", 400, NotFound),
    ("InvalidAddress", 400, NotFound),
    ("NotFound", 404, NotFound),
    ("ResourceNotFoundException", 404, NotFound),
    ("RequestThrottled", 400, Transient),
    ("Throttled", 429, Transient),
    ("ThrottlingException", 400, Transient),
    ("OverLimit", 403, Transient),
    ("KmsThrottled", 400, Transient),
    ("KMSThrottling", 400, Transient),
    ("InternalError", 500, Transient),
    ("ServiceUnavailable", 503, Transient),
    ("SomethingNew", 500, Transient),
    ("SomethingNew", 429, Transient),
    ("BatchRequestTooLong", 400, TooLarge),
    ("SomethingNew", 400, AdapterError),
]


@pytest.mark.parametrize(("code", "status", "kind"), CODES)
async def test_codes_of_both_protocols(stand_in, code, status, kind):
    stand_in.on["SendMessageBatch"] = stand_in.on["PublishBatch"] = refuse(code, status)
    async with open_topic(QUEUE) as queue, open_topic(SNS) as topic:
        for one, action in ((queue, "sqs:SendMessage"), (topic, "sns:Publish")):
            outcomes = await one.publish([Outgoing(b"1"), Outgoing(b"2")])
            assert [type(outcome) for outcome in outcomes] == [kind, kind]
            line = str(outcomes[0])
            assert f"{action} on {one.name}: {code}: as the service says it" in line
            assert "\n" not in line
    # Never retried here: what is too large together is sent apart, once.
    calls = 3 if kind is TooLarge else 1
    assert (len(stand_in.called("SendMessageBatch")), len(stand_in.called("PublishBatch"))) == (calls, calls)


@pytest.mark.parametrize(
    ("operation", "args", "kind", "named"),
    [
        ("GetQueueUrl", ("QueueDoesNotExist",), NotFound, "no queue 'q' in us-east-1"),
        ("GetQueueAttributes", ("QueueDoesNotExist",), NotFound, "no queue 'q' in us-east-1"),
        ("GetQueueUrl", ("AccessDenied", 403), Denied, "sqs:GetQueueUrl on q in us-east-1"),
        ("GetQueueAttributes", ("AccessDenied", 403), Denied, "sqs:GetQueueAttributes on .*/q"),
        ("GetQueueAttributes", ("InternalError", 500), Transient, "InternalError"),
    ],
)
async def test_opening_says_what_to_fix(stand_in, operation, args, kind, named):
    stand_in.on[operation] = refuse(*args)
    for opener in (open_subscription, open_topic):
        with pytest.raises(kind, match=named) as caught:
            async with opener(QUEUE):
                pass
        assert "\n" not in str(caught.value)


async def test_a_queue_without_a_visibility_timeout_needs_a_lease(stand_in):
    stand_in.on["GetQueueAttributes"] = lambda _: {"Attributes": ATTRIBUTES | {"VisibilityTimeout": "0"}}
    with pytest.raises(BadURL, match="lease=SECONDS"):
        async with open_subscription(QUEUE):
            pass
    async with open_subscription(f"{QUEUE}?lease=7") as subscription:
        assert subscription.lease_seconds == 7


async def test_a_topic_needs_no_more_than_publish(stand_in):
    stand_in.on["GetTopicAttributes"] = refuse("AuthorizationError", 403)
    async with open_topic(SNS) as topic:
        assert topic.max_body == sns.MAX_MESSAGE


@pytest.mark.parametrize(
    ("args", "kind"),
    [
        (("NotFound", 404), NotFound),
        (("InvalidClientTokenId", 403), Denied),
        (("ExpiredToken", 403), Denied),
        (("InternalError", 500), Transient),
    ],
)
async def test_a_topic_that_cannot_be_opened(stand_in, args, kind):
    stand_in.on["GetTopicAttributes"] = refuse(*args)
    with pytest.raises(kind, match="sns:GetTopicAttributes on arn:aws:sns"):
        async with open_topic(SNS):
            pass


async def test_a_topic_with_a_larger_limit(stand_in):
    entry = {"key": "MaximumMessageSize", "value": 1048576}
    stand_in.on["GetTopicAttributes"] = lambda _: {"Attributes": {"entry": entry}}
    async with open_topic(SNS) as topic:
        assert topic.max_body == 1048576


async def test_entries_fail_one_by_one(stand_in):
    stand_in.on["ReceiveMessage"] = lambda _: received(10)
    answers = {
        "r0": ("ReceiptHandleIsInvalid", True),
        "r1": ("InvalidParameterValue", True),
        "r2": ("InvalidParameterValueException", False),
        "r4": ("MessageNotInflight", True),
        "r5": ("AWS.SimpleQueueService.MessageNotInflight", True),
        "r6": ("RequestThrottled", True),
        "r7": ("InternalError", False),
        "r8": ("SomethingNew", False),
        "r9": "untold",
    }
    kinds = [LeaseLost, LeaseLost, LeaseLost, None, LeaseLost, LeaseLost, Transient, Transient, Transient, Transient]
    stand_in.on["DeleteMessageBatch"] = stand_in.on["ChangeMessageVisibilityBatch"] = failing(answers)
    async with open_subscription(QUEUE) as subscription:
        messages = await subscription.receive(10, 0)
        for outcomes in (await subscription.ack(messages), await subscription.set_lease(messages, 5)):
            assert [outcome and type(outcome) for outcome in outcomes] == kinds
        # A message that nobody holds needs not be let go.
        outcomes = await subscription.set_lease(messages, 0)
        assert [outcome and type(outcome) for outcome in outcomes] == [*kinds[:4], None, None, *kinds[6:]]
    assert "m1" in str(outcomes[1])
    assert "because" in str(outcomes[1])


async def test_settling_goes_in_tens_and_one_refusal_fails_its_ten(stand_in):
    stand_in.on["ReceiveMessage"] = lambda _: received(10)
    calls = 0

    def handler(fields):
        nonlocal calls
        calls += 1
        if any(entry["ReceiptHandle"] == "poison" for entry in fields["Entries"]):
            raise Refusal("InternalError", 500)
        return {"Successful": [{"Id": entry["Id"]} for entry in fields["Entries"]]}

    stand_in.on["DeleteMessageBatch"] = handler
    async with open_subscription(QUEUE) as subscription:
        messages = [one for _ in range(3) for one in await subscription.receive(10, 0)][:23]
        object.__setattr__(messages[15], "lease", sqs_subscription.Receipt("poison", 0))
        outcomes = await subscription.ack(messages)
    assert calls == 3
    assert [place for place, outcome in enumerate(outcomes) if outcome is not None] == list(range(10, 20))
    assert {type(outcome) for outcome in outcomes} == {type(None), Transient}


async def test_no_message_is_held_past_twelve_hours_from_its_receipt(stand_in):
    stand_in.on["ReceiveMessage"] = lambda _: received(3)
    stand_in.on["ChangeMessageVisibilityBatch"] = failing({})
    async with open_subscription(QUEUE) as subscription:
        fresh, old, ancient = await subscription.receive(10, 0)
        now = asyncio.get_running_loop().time()
        object.__setattr__(old, "lease", sqs_subscription.Receipt("old", now - 43_000))
        object.__setattr__(ancient, "lease", sqs_subscription.Receipt("ancient", now - 43_190))
        outcomes = await subscription.set_lease([fresh, old, ancient], 43_200)
        assert outcomes[:2] == [None, None]
        assert isinstance(outcomes[2], LeaseLost)
        (call,) = stand_in.called("ChangeMessageVisibilityBatch")
        asked = {entry["ReceiptHandle"]: entry["VisibilityTimeout"] for entry in call["Entries"]}
        assert 43_200 - asked["r0"] >= 60
        assert 0 < asked["old"] <= 200 - 60
        assert set(asked) == {"r0", "old"}
        # It can still be let go and acked, as long as the service lets it.
        assert await subscription.set_lease([ancient], 0) == [None]
        assert subscription.max_hold_seconds < subscription.max_lease_seconds == 43_200


async def test_the_service_counts_twelve_hours_by_its_own_clock(stand_in):
    stand_in.on["ReceiveMessage"] = lambda _: received(1)
    text = (
        "Value 43140 for parameter VisibilityTimeout is invalid. Reason: Total VisibilityTimeout for the message is "
        "beyond the limit [43200 seconds]"
    )
    failed = {"Id": "0", "Code": "InvalidParameterValue", "SenderFault": True, "Message": text}
    stand_in.on["ChangeMessageVisibilityBatch"] = lambda _: {"Failed": [failed]}
    async with open_subscription(QUEUE) as subscription:
        (outcome,) = await subscription.set_lease(await subscription.receive(1, 0), 43_200)
    assert isinstance(outcome, LeaseLost)
    assert "beyond the limit" in str(outcome)


async def test_seconds_are_rounded_up_and_zero_stays(stand_in):
    stand_in.on["ReceiveMessage"] = lambda _: received(1)
    stand_in.on["ChangeMessageVisibilityBatch"] = failing({})
    async with open_subscription(QUEUE) as subscription:
        messages = await subscription.receive(1, 0)
        for seconds in (0, 0.01, 1, 1.5):
            await subscription.set_lease(messages, seconds)
    asked = [call["Entries"][0]["VisibilityTimeout"] for call in stand_in.called("ChangeMessageVisibilityBatch")]
    assert asked == [0, 1, 1, 2]


async def test_what_a_receive_asks_for(stand_in, monkeypatch):
    monkeypatch.setattr(sqs_subscription, "POLL_SECONDS", 2)
    answers = iter([{}, received(1)])
    stand_in.on["ReceiveMessage"] = lambda _: next(answers)
    async with open_subscription(f"{QUEUE}?lease=9") as subscription:
        assert len(await subscription.receive(25, 600)) == 1
    first, second = stand_in.called("ReceiveMessage")
    assert first == second
    assert (first["MaxNumberOfMessages"], first["WaitTimeSeconds"], first["VisibilityTimeout"]) == (10, 2, 9)


async def test_an_empty_answer_before_its_time_makes_no_storm(stand_in):
    """As SQS's answers are where as many messages are in flight as may be."""
    stand_in.on["ReceiveMessage"] = lambda _: {}
    async with open_subscription(QUEUE) as subscription:
        assert await subscription.receive(1, 3) == []
    assert 1 < len(stand_in.called("ReceiveMessage")) <= 30


async def test_a_redrive_policy_and_a_dead_letter_queue_that_may_not_be_counted(stand_in):
    policy = '{"deadLetterTargetArn": "arn:aws:sqs:us-east-1:000000000000:dead", "maxReceiveCount": "4"}'
    counts = {"ApproximateNumberOfMessages": "3", "ApproximateNumberOfMessagesNotVisible": "2"}
    stand_in.on["GetQueueAttributes"] = lambda _: {"Attributes": ATTRIBUTES | counts | {"RedrivePolicy": policy}}
    async with open_subscription(QUEUE) as subscription:
        assert subscription.max_attempts == 4
        stand_in.on["GetQueueUrl"] = refuse("AccessDenied", 403)
        backlog = await subscription.backlog()
        assert (backlog.waiting, backlog.held, backlog.dead) == (3, 2, None)
        stand_in.on["GetQueueUrl"] = refuse("InternalError", 500)
        with pytest.raises(Transient):
            await subscription.backlog()
