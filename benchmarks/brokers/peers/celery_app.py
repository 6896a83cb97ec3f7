"""Celery on SQS as its users run it: `python celery_app.py fill` and `python celery_app.py work`.

The answer is a task that is sent to the response queue. `acks_late`, so that a crash loses nothing, as here.
"""

import os
import sys

from celery import Celery

ENDPOINT = os.environ["AWS_ENDPOINT_URL"]

app = Celery("echo", broker="sqs://")
app.conf.update(
    broker_transport_options={
        "region": os.environ["AWS_DEFAULT_REGION"],
        "predefined_queues": {
            name: {"url": f"{ENDPOINT}/000000000000/{name}"}
            for name in (os.environ["REQUESTS"], os.environ["RESPONSES"])
        },
        "wait_time_seconds": 5,
    },
    task_default_queue=os.environ["REQUESTS"],
    task_ignore_result=True,
    task_acks_late=True,
    worker_prefetch_multiplier=20,
    worker_enable_remote_control=False,
    worker_send_task_events=False,
)


@app.task(name="answered")
def answered(body: str) -> None:
    """What would run on the other side; nobody does here."""


@app.task(name="echo")
def echo(body: str) -> None:
    """Answer with the body."""
    answered.apply_async(args=[body], queue=os.environ["RESPONSES"])


if __name__ == "__main__":
    if sys.argv[1] == "fill":
        for n in range(int(os.environ["MESSAGES"])):
            echo.delay(f"hello {n}")
    else:
        quiet = ["--loglevel", "WARNING", "--without-gossip", "--without-mingle", "--without-heartbeat"]
        os.execv(sys.executable, [sys.executable, "-m", "celery", "-A", "celery_app", "worker", *quiet, *sys.argv[2:]])
