"""What is good and bad in the settings of a Pub/Sub subscription or topic: judging only, nothing is asked."""

from typing import Any

from rejoinder.adapters.checkup import Finding, advice, attempts, fail, lease, ok, unknown

DAY = 86_400
DEFAULT_RETENTION = 7 * DAY
DEFAULT_EXPIRATION = 31 * DAY


def undeliverable(info: Any, resource: str) -> Finding | None:
    """Say why nothing can be pulled from the subscription `info` at all; None where it can."""
    name, project = _names(resource)
    make = "make the subscription again, of a topic that is there"
    if info.topic == "_deleted-topic_":
        return fail("reachable", f"the topic of {resource} was deleted: nothing arrives", make)
    if info.detached:
        return fail("reachable", f"{resource} is detached from its topic: nothing arrives", make)
    if info.push_config.push_endpoint:
        pull = f"gcloud pubsub subscriptions update {name} --project={project} --push-endpoint="
        return fail("reachable", f"{resource} pushes to {info.push_config.push_endpoint}: it cannot be pulled", pull)
    if info.bigquery_config.table or info.cloud_storage_config.bucket:
        return fail("reachable", f"{resource} writes to BigQuery or Cloud Storage: it cannot be pulled", make)
    return None


def subscription_policies(info: Any, resource: str) -> list[Finding]:
    """Judge the settings of the subscription `info`."""
    name, project = _names(resource)
    update = f"gcloud pubsub subscriptions update {name} --project={project}"
    return [
        lease(info.ack_deadline_seconds, f"{update} --ack-deadline=60"),
        *_dead_letters(info, resource, update),
        _retry(info, update),
        _retention(info, update),
        _expiration(info, update),
        *_order(info),
    ]


def _dead_letters(info: Any, resource: str, update: str) -> list[Finding]:
    policy = info.dead_letter_policy
    if not policy.dead_letter_topic:
        fact = (
            "none, so deliveries are not counted: a retryable error is tried again for as long as the message is kept"
        )
        return [advice("dead-letter policy", fact, f"{update} --dead-letter-topic=TOPIC --max-delivery-attempts=5")]
    name, project = _names(resource)
    topic, topic_project = _names(policy.dead_letter_topic)
    agent = "--member=serviceAccount:service-PROJECT_NUMBER@gcp-sa-pubsub.iam.gserviceaccount.com"
    todo = (
        f"gcloud pubsub topics add-iam-policy-binding {topic} --project={topic_project} {agent}"
        f" --role=roles/pubsub.publisher; gcloud pubsub subscriptions add-iam-policy-binding {name}"
        f" --project={project} {agent} --role=roles/pubsub.subscriber"
    )
    fact = "Pub/Sub's own service account moves dead letters only if it may, which cannot be seen from here"
    more = f"{update} --max-delivery-attempts=5"
    return [
        attempts(policy.max_delivery_attempts, policy.dead_letter_topic, more),
        unknown("dead-letter permissions", fact, todo),
    ]


def _retry(info: Any, update: str) -> Finding:
    if not info.HasField("retry_policy"):
        fact = "none: what a stopping worker hands back comes back at once (a failed request is delayed by the worker)"
        return advice("retry policy", fact, f"{update} --min-retry-delay=1s --max-retry-delay=60s")
    policy = info.retry_policy
    delays = f"{policy.minimum_backoff.seconds} s to {policy.maximum_backoff.seconds} s"
    return ok("retry policy", f"{delays}, on top of the worker's own delays")


def _retention(info: Any, update: str) -> Finding:
    seconds = info.message_retention_duration.seconds or DEFAULT_RETENTION
    fact = f"a request that is not answered within {_days(seconds)} is deleted"
    if seconds < DAY:
        return advice("retention", fact, f"{update} --message-retention-duration=7d")
    return ok("retention", fact)


def _expiration(info: Any, update: str) -> Finding:
    never = f"{update} --expiration-period=never"
    if info.HasField("expiration_policy") and not info.expiration_policy.HasField("ttl"):
        return ok("expiration", "never")
    seconds = info.expiration_policy.ttl.seconds or DEFAULT_EXPIRATION
    return advice("expiration", f"the subscription is deleted when nobody pulls from it for {_days(seconds)}", never)


def _order(info: Any) -> list[Finding]:
    ordered = "by ordering key" if info.enable_message_ordering else "none: ordering keys are not regarded"
    once = "lost leases are told" if info.enable_exactly_once_delivery else "off: a late ack may not be told as lost"
    found = [ok("ordering", ordered), ok("exactly-once", once)]
    if info.filter:
        fact = f"only messages with {info.filter} arrive; all others are dropped without a word"
        found.append(advice("filter", fact, "publish requests with the attributes that it wants, or do without it"))
    return found


def topic_policies(info: Any) -> list[Finding]:
    """Judge the settings of the topic `info`."""
    found = []
    if info.schema_settings.schema:
        fact = f"messages must keep to {info.schema_settings.schema}: a response that does not is refused"
        found.append(advice("schema", fact, "use a topic without a schema for responses"))
    if info.kms_key_name:
        found.append(ok("encryption", f"by {info.kms_key_name}: publishing fails while that key is disabled"))
    return found


def _names(resource: str) -> tuple[str, str]:
    """Return the short name and the project of `projects/P/topics/T`."""
    _, project, _, name = resource.split("/")
    return name, project


def _days(seconds: int) -> str:
    return f"{seconds / DAY:g} days" if seconds >= DAY else f"{seconds} s"
