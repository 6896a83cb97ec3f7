"""What is good and bad in the settings of an SQS queue: judging only, nothing is asked."""

from collections.abc import Mapping
from typing import Final

from rejoinder.adapters.checkup import Finding, advice, attempts, lease, no_dead_letters, ok
from rejoinder.adapters.sqs import MAX_BATCH, Queue

DAY: Final = 86_400
IN_FLIGHT: Final = 120_000
"""At about as many, SQS gives out no more, and does not say so."""


def waiting_policies(attributes: Mapping[str, str], own_lease: int | None, change: str) -> list[Finding]:
    """Judge what matters to who receives; `own_lease` is the URL's."""
    if own_lease is not None:
        return [lease(own_lease, "set lease=60 in the URL, or leave it out")]
    return [lease(int(attributes.get("VisibilityTimeout", 30)), f"{change}VisibilityTimeout=60")]


def queue_policies(attributes: Mapping[str, str], change: str) -> list[Finding]:
    """Judge retention, delay and order."""
    seconds = int(attributes.get("MessageRetentionPeriod", 4 * DAY))
    fact = f"a message that nobody has acknowledged is deleted after {seconds / DAY:.3g} days"
    found = [
        ok("retention", fact)
        if seconds >= DAY
        else advice("retention", fact, f"{change}MessageRetentionPeriod=1209600")
    ]
    if delay := int(attributes.get("DelaySeconds", 0)):
        found.append(advice("delay", f"every message comes {delay} s late", f"{change}DelaySeconds=0"))
    return [*found, *_order(attributes, change)]


def _order(attributes: Mapping[str, str], change: str) -> list[Finding]:
    if attributes.get("FifoQueue") != "true":
        return [ok("ordering", "none (a standard queue)")]
    found = [ok("ordering", "by message group: one at a time of each is worked on")]
    if attributes.get("ContentBasedDeduplication") == "true":
        fact = "messages of equal bodies within 5 minutes are one, unless their sender gives deduplication ids"
        found.append(ok("deduplication", fact))
    if attributes.get("FifoThroughputLimit") != "perMessageGroupId":
        fact = "300 calls/s of each kind for the whole queue"
        high = f"{change}DeduplicationScope=messageGroup,FifoThroughputLimit=perMessageGroupId"
        found.append(advice("throughput", fact, high))
    return found


def size_limit(attributes: Mapping[str, str], change: str) -> Finding:
    """Judge the largest message."""
    limit = int(attributes.get("MaximumMessageSize", MAX_BATCH))
    if limit < MAX_BATCH:
        return advice(
            "size limit", f"{limit} bytes, of {MAX_BATCH} possible", f"{change}MaximumMessageSize={MAX_BATCH}"
        )
    return ok("size limit", f"{limit} bytes")


def messages(attributes: Mapping[str, str]) -> Finding:
    """Say how many there are."""
    waiting, held, delayed = _counts(attributes)
    fact = f"about {waiting} waiting, {held} held, {delayed} delayed"
    if held > 0.8 * IN_FLIGHT:
        todo = "hold fewer: fewer workers, or a smaller --prefetch"
        return advice("messages", f"{fact}: near {IN_FLIGHT} held, no more are given out, without a word", todo)
    return ok("messages", fact)


def _counts(attributes: Mapping[str, str]) -> tuple[int, ...]:
    return tuple(int(attributes.get(f"ApproximateNumberOfMessages{kind}", 0)) for kind in ("", "NotVisible", "Delayed"))


def dead_letters(queue: Queue, source: Mapping[str, str], dead: Mapping[str, str] | None, change: str) -> list[Finding]:
    """Judge the redrive policy of `queue`, and the settings of its dead-letter queue (`dead`)."""
    if queue.max_attempts is None or queue.dead_letter_arn is None or dead is None:
        policy = '\'{"RedrivePolicy":"{\\"deadLetterTargetArn\\":\\"ARN\\",\\"maxReceiveCount\\":\\"5\\"}"}\''
        return [no_dead_letters(f"{change}{policy}")]
    arn = queue.dead_letter_arn
    policy = f'\'{{"RedrivePolicy":"{{\\"deadLetterTargetArn\\":\\"{arn}\\",\\"maxReceiveCount\\":\\"5\\"}}"}}\''
    found = [attempts(queue.max_attempts, arn, f"{change}{policy}")]
    kept, own = (int(one.get("MessageRetentionPeriod", 4 * DAY)) for one in (dead, source))
    region, _, name = arn.split(":")[3:6]
    if kept <= own and not queue.fifo and kept < 14 * DAY:
        fact = f"{arn} keeps messages {kept / DAY:.3g} days from their first sending, the queue itself {own / DAY:.3g}"
        url = f"$(aws sqs get-queue-url --region {region} --queue-name {name} --query QueueUrl --output text)"
        longer = f"aws sqs set-queue-attributes --region {region} --queue-url {url}"
        longer += " --attributes MessageRetentionPeriod=1209600"
        found.append(advice("dead-letter retention", fact, longer))
    else:
        found.append(ok("dead-letter retention", f"{kept / DAY:.3g} days"))
    if count := sum(_counts(dead)):
        back = f"aws sqs start-message-move-task --region {region} --source-arn {arn}"
        take = f"rejoinder consume --responses 'awssqs:///{name}?region={region}' --timeout 5"
        todo = f"send them back with `{back}`, or take them out and print them with `{take}`"
        found.append(advice("dead letters", f"about {count} in {arn}", todo))
    return found
