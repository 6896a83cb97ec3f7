"""dramatiq_sqs as its users run it: `python dramatiq_app.py fill` and `python dramatiq_app.py work`.

The answer is a message to another actor, whose queue is the response queue.
"""

import os
import sys

import dramatiq
from dramatiq_sqs import SQSBroker

dramatiq.set_broker(SQSBroker())


@dramatiq.actor(queue_name=os.environ["RESPONSES"])
def answered(body: str) -> None:
    """What would run on the other side; nobody does here."""


@dramatiq.actor(queue_name=os.environ["REQUESTS"])
def echo(body: str) -> None:
    """Answer with the body."""
    answered.send(body)


if __name__ == "__main__":
    if sys.argv[1] == "fill":
        for n in range(int(os.environ["MESSAGES"])):
            echo.send(f"hello {n}")
    else:
        command = [sys.executable, "-m", "dramatiq", "dramatiq_app", "--queues", os.environ["REQUESTS"]]
        os.execv(sys.executable, command + sys.argv[2:])
