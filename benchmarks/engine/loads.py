"""What is asked: prompts of some length, answers of one length or of mixed ones. The same on every call."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TEXT = """the river runs past old stones and a quiet mill where people met to talk of rain bread and long roads"""


@dataclass(frozen=True)
class Load:
    """Lengths in tokens, each drawn with its own chance from `random()`."""

    prompt: Callable[[random.Random], int]
    answer: Callable[[random.Random], int]


def _skewed(chance: random.Random) -> int:
    """4 to 128, mean about 35: most answers are short, a few are long."""
    return int(4 + 124 * chance.random() ** 3)


def _lognormal(median: float, sigma: float, most: int) -> Callable[[random.Random], int]:
    return lambda chance: max(8, min(most, int(median * 2.718281828 ** (sigma * chance.gauss(0, 1)))))


LOADS = {
    "short, uniform": Load(lambda chance: chance.randint(16, 48), lambda _: 32),
    "short, skewed": Load(lambda chance: chance.randint(16, 48), _skewed),
    "512, uniform": Load(lambda _: 512, lambda _: 32),
    "512, skewed": Load(lambda _: 512, _skewed),
    # Chats as they come: prompts around 300 tokens and answers around 150, both with long tails.
    "realistic": Load(_lognormal(300, 0.9, 4000), _lognormal(150, 0.8, 1024)),
}


@dataclass(frozen=True)
class Prompt:
    """One request."""

    text: str
    ids: list[int]
    max_tokens: int


def prompts(name: str, count: int, tokenizer: Any) -> list[Prompt]:
    """`count` requests of a load; their texts have the lengths asked for, to the token."""
    load, chance, words = LOADS[name], random.Random(17), TEXT.split()
    made = []
    for _ in range(count):
        length, answer = load.prompt(chance), load.answer(chance)
        text = " ".join(chance.choice(words) for _ in range(2 * length))
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        cut = text[: offsets[length - 1][1]]
        made.append(Prompt(cut, tokenizer(cut).input_ids, answer))
    return made
