"""Which waiting sequences run as one static batch: like with like, since each costs what the longest one costs."""

from collections.abc import Iterable
from dataclasses import dataclass

PROMPT_RATIO = 2
"""A prompt is padded to at most about this many times its length: what is computed of padding is wasted."""
NEW_RATIO = 4
"""A batch runs to its longest row. A row that may end much earlier stands empty then, but it costs little: a step of a
batch takes hardly longer than one of half of it."""
SLACK = 32
"""Tokens of difference that are too few to run a batch of their own for."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one batch may be."""

    rows: int
    tokens: int | None = None
    """Of all rows, prompts and new ones, padding included. None: not bounded."""
    prompt_tokens: int | None = None
    """Of all rows' prompts, padding included. None: not bounded."""
    padding: bool = True
    """Whether rows may be padded. Otherwise only prompts of equal lengths run together."""


def gather(shapes: Iterable[tuple[int, int]], bounds: Bounds) -> list[int]:
    """The places of those that run now: the first, which has waited longest, and what fits to it, in order.

    Args:
        shapes: Prompt tokens and new tokens of each, at most; those that came first stand first.
        bounds: What the batch may be. The first one runs whatever they say: nothing else would become of it.
    """
    chosen: list[int] = []
    prompts = news = (0, 0)  # of the chosen ones, shortest and longest
    for place, (prompt, new) in enumerate(shapes):
        if not chosen:
            prompts, news = (prompt, prompt), (new, new)
        else:
            wider = min(prompts[0], prompt), max(prompts[1], prompt)
            longer = min(news[0], new), max(news[1], new)
            if not _fits(wider, longer, len(chosen) + 1, bounds):
                continue
            prompts, news = wider, longer
        chosen.append(place)
        if len(chosen) == bounds.rows:
            break
    return chosen


def _fits(prompts: tuple[int, int], news: tuple[int, int], rows: int, bounds: Bounds) -> bool:
    alike = prompts[1] <= PROMPT_RATIO * prompts[0] + SLACK if bounds.padding else prompts[0] == prompts[1]
    return (
        alike
        and news[1] <= NEW_RATIO * news[0] + SLACK
        and (bounds.tokens is None or rows * (prompts[1] + news[1]) <= bounds.tokens)
        and (bounds.prompt_tokens is None or rows * prompts[1] <= bounds.prompt_tokens)
    )
