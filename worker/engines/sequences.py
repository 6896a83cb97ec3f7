"""What engines that generate text do alike: a body becomes sequences, and those the choices of its answer. No torch."""

import asyncio
import contextlib
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeVar

from rejoinder.schemas.openai import ChatCompletionRequest, CompletionRequest
from rejoinder.worker.engines import admission, answers
from rejoinder.worker.engines.admission import Limits
from rejoinder.worker.engines.answers import Candidate, Choice, Place
from rejoinder.worker.engines.chunks import Chunks
from rejoinder.worker.engines.protocol import EngineRequest
from rejoinder.worker.engines.token_bytes import TokenBytes, offsets

if TYPE_CHECKING:
    from rejoinder.worker.engines.transformers.text import Text

SHARE = 4
"""One request runs at most one in so many of the places in the batch at once: `n` of 128 must not hold up requests of
one sequence each, whose own time limits run meanwhile."""

T = TypeVar("T")
Body = CompletionRequest | ChatCompletionRequest


@dataclass(frozen=True, slots=True)
class Planned:
    """One sequence of a request."""

    index: int
    """Of its choice."""
    prompt: list[int]
    max_new_tokens: int
    seed: int
    """64 bits, its own."""


def prompts_of(text: "Text", body: Body, limits: Limits) -> list[list[int]]:
    """The token ids of each prompt, admitted. Blocks.

    Raises:
        BadRequest: a prompt is none that the model could see, or its chat template refuses the conversation.
        RequestTooLarge: no new token would fit behind a prompt.
    """
    if isinstance(body, CompletionRequest):
        param = "prompt"
        for prompt in body.prompts:
            if isinstance(prompt, str):
                admission.check_text(prompt, limits, param)
        prompts = [text.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts]
    else:
        param = "messages"
        admission.check_text("".join(message.text for message in body.messages), limits, param)
        prompts = [text.encode_chat(body.messages)]
    for ids in prompts:
        admission.check_tokens(ids, limits, param)
    return prompts


def planned(request: EngineRequest, body: Body, prompts: Sequence[list[int]], limits: Limits) -> list[Planned]:
    """The sequences of a request, `n` for each prompt, in the order of its choices.

    Raises:
        BadRequest: more new tokens are asked for than fit behind a prompt.
    """
    origin = request.response_id if body.seed is None else body.seed
    each = [(prompt, admission.new_tokens(body, len(prompt), limits)) for prompt in prompts for _ in range(body.n)]
    return [Planned(index, prompt, tokens, sequence_seed(origin, index)) for index, (prompt, tokens) in enumerate(each)]


def sequence_seed(origin: int | str, choice: int) -> int:
    """64 bits from a request's own seed, or from its response id, and the choice's index.

    Hashed, not added: choice 1 of seed 1 must have nothing in common with choice 0 of seed 2.
    """
    kind = "seed" if isinstance(origin, int) else "id"
    return int.from_bytes(blake2b(f"{kind}:{origin}:{choice}".encode(), digest_size=8).digest())


async def together(sequences: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in order. The first failure, or cancelling, ends the others too."""
    tasks = [asyncio.create_task(sequence) for sequence in sequences]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def places(
    names: TokenBytes,
    tokens: Sequence[int],
    logprobs: Iterable[tuple[float, Iterable[tuple[int, float]]]],
    text: str,
    before: str | None,
) -> list[Place]:
    """What is told of the tokens that begin in the returned text: none of a stop string's own.

    Args:
        names: What tokens read as.
        tokens: Generated, without the one that ended them.
        logprobs: Of each of them, and token ids and log-probabilities of the likeliest ones there, likeliest first.
        text: Of all the tokens.
        before: What is returned of it, where a stop string cut it.
    """
    parts = names.parts(tokens, text)
    return [
        Place(
            Candidate(names.shown(token), logprob, part),
            offset,
            [Candidate(names.shown(other), likely, names.of(other)) for other, likely in top],
        )
        for token, (logprob, top), part, offset in zip(tokens, logprobs, parts, offsets(parts), strict=False)
        if before is None or offset < len(before)
    ]


@contextlib.contextmanager
def chunks_of(request: EngineRequest, body: Body, model: str) -> Iterator[Chunks | None]:
    """Where the request asks for a stream, what tells it; nothing is told once the block is left."""
    if request.emit is None:
        yield None
        return
    with contextlib.closing(
        Chunks(request, request.emit, model, chat=not isinstance(body, CompletionRequest))
    ) as chunks:
        yield chunks


def answer(
    request: EngineRequest,
    body: Body,
    model: str,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Choice],
    *,
    chunks: Chunks | None,
) -> dict[str, Any]:
    """The response's body: of a stream, the last chunk."""
    tokens = sum(map(len, prompts))
    if chunks is not None:
        return chunks.last(tokens, choices)
    shape = answers.completion if isinstance(body, CompletionRequest) else answers.chat_completion
    return shape(request, model, tokens, choices)
