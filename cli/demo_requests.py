"""What the demo asks: prompts of several kinds and lengths, and one request that is wrong on purpose."""

from typing import Any

ARTICLE = (
    "Honey bees tell each other where flowers are by dancing. A bee that comes back to the hive runs along a straight"
    " line while it waggles, turns around, and does it again. The angle of the line shows the direction relative to"
    " the sun, and the length of the waggle shows the distance. The other bees follow the dancer closely in the dark,"
    " and then fly out and find the flowers, sometimes kilometres away."
)


def _chat(topic: str, content: str, max_tokens: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, **more}
    return {"path": "/v1/chat/completions", "metadata": {"topic": topic}, "body": body}


def _text(topic: str, prompt: str, max_tokens: int) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    return {"path": "/v1/completions", "metadata": {"topic": topic}, "body": body}


REFUSED = "a temperature of 9"
"""The topic of the request that must be refused."""

_ALL = [
    _chat("geography", "What is the capital of France?", 24),
    _chat("astronomy", "Which planets does the solar system have?", 64),
    _text("story", "Once upon a time, in a small village by the sea,", 48),
    _chat("poetry", "Write a haiku about rain.", 32),
    _text("colours", "The three primary colours are", 12),
    _chat("animals", "Which animal says meow?", 16),
    _chat("summary", f"Summarise this in one sentence: {ARTICLE}", 56),
    _text("code", "def fibonacci(n):\n", 48),
    _chat(REFUSED, "How hot can it get?", 16, temperature=9),
    _chat("physics", "Explain in two sentences why the sky is blue.", 72),
    _chat("language", "How do you say good morning in Spanish?", 20),
    _text("cooking", "To make bread you need flour, water,", 24),
    _chat("health", "Give three tips for sleeping well.", 80),
]


def demo_requests(run: str) -> list[dict[str, Any]]:
    """All requests, each with an id of its own in its metadata, and that of the run."""
    return [_of(run, number, request) for number, request in enumerate(_ALL, 1)]


def hello(run: str) -> dict[str, Any]:
    """What is sent ahead: its answer says that the model is loaded, so that the table's times are of the work alone."""
    return _of(run, 0, _text("hello", "Hello", 1))


def _of(run: str, number: int, request: dict[str, Any]) -> dict[str, Any]:
    return {**request, "metadata": {"id": number, "run": run, **request["metadata"]}}


def prompt_of(request: dict[str, Any]) -> str:
    """What a request asks, as a person would read it."""
    body = request["body"]
    return str(body["prompt"] if "prompt" in body else body["messages"][-1]["content"])
