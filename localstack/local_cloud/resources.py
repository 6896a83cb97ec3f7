"""What the local cloud holds for the examples, by name; nothing here talks to it."""

REGION = "us-east-1"
ACCOUNT = "000000000000"
PROJECT = "local"

LEASE_SECONDS = 60
MAX_ATTEMPTS = 5
DEAD_SECONDS = 14 * 86_400
"""How long SQS's dead-letter queues keep what they get: longer than the queues do, since its age moves with it."""
RETRY_SECONDS = (1, 60)
"""Pub/Sub's retry policy: the least and the most it waits before it delivers a message again."""

DEAD = "requests-dead"
ORDERED = "-ordered"

# Each SQS queue and its dead-letter queue, made before it.
QUEUES = {
    DEAD: None,
    f"{DEAD}.fifo": None,
    "requests": DEAD,
    "requests.fifo": f"{DEAD}.fifo",
    "responses": None,
    "responses.fifo": None,
    "responses-by-sns": None,
}
# Each SNS topic and the queue that is subscribed to it, raw.
SNS_TOPICS = {"responses": "responses-by-sns"}
BUCKETS = ("rejoinder-input", "rejoinder-output")

# Each Pub/Sub topic has one subscription of the same name; and its dead-letter topic, made before it.
PUBSUB_TOPICS = {
    DEAD: None,
    "requests": DEAD,
    f"requests{ORDERED}": DEAD,
    "responses": None,
    f"responses{ORDERED}": None,
}


def aws_environment(endpoint: str) -> dict[str, str]:
    """The environment in which AWS's SDKs and ours talk to LocalStack at `endpoint`."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": REGION,
    }


def pubsub_environment(address: str) -> dict[str, str]:
    """The environment in which Google's clients and ours talk to the emulator at `address` (host:port)."""
    return {"PUBSUB_EMULATOR_HOST": address, "PUBSUB_PROJECT_ID": PROJECT}


def sqs(queue: str) -> str:
    """The URL of an SQS queue, for either side."""
    return f"awssqs:///{queue}?region={REGION}"


def sns(topic: str) -> str:
    """The URL of an SNS topic."""
    return f"awssns:///arn:aws:sns:{REGION}:{ACCOUNT}:{topic}?region={REGION}"


def pubsub(kind: str, name: str) -> str:
    """The URL of a Pub/Sub topic or subscription; `kind` is `topics` or `subscriptions`."""
    return f"gcppubsub://projects/{PROJECT}/{kind}/{name}"


# What to give to which command, for people.
URLS = (
    ("SQS: publish and worker --requests", sqs("requests")),
    ("     worker and consume --responses", sqs("responses")),
    ("     in order (FIFO): requests", sqs("requests.fifo")),
    ("     in order (FIFO): responses", sqs("responses.fifo")),
    ("     dead requests", sqs(DEAD)),
    ("SNS: worker --responses", sns("responses")),
    ("     consume --responses", sqs("responses-by-sns")),
    ("Pub/Sub: publish --requests", pubsub("topics", "requests")),
    ("     worker --requests", pubsub("subscriptions", "requests")),
    ("     worker --responses", pubsub("topics", "responses")),
    ("     consume --responses", pubsub("subscriptions", "responses")),
    ("     in order: the same names with", ORDERED),
    ("     dead requests", pubsub("subscriptions", DEAD)),
    ("S3: buckets", " ".join(f"s3://{bucket}" for bucket in BUCKETS)),
)
