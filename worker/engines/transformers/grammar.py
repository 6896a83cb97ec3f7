"""JSON schemas as grammars over a model's tokens: which may come next, for each sequence.

llguidance does it. A schema that it does not understand in full is refused, never followed in part.
"""

import asyncio
import json
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rejoinder.worker.engines.transformers import grammar_check
from rejoinder.worker.engines.transformers.penalties import unseen
from rejoinder.worker.errors import BadRequest, Failed, Unavailable

MAX_CHARACTERS = 64 * 1024
"""Of a schema's text."""
KEPT = 64
"""Schemas, or what is wrong with them, that need not be compiled again."""
CHECK_SECONDS = 10.0
"""By the clock. `grammar_check` ends itself after much less of the processor: it is the machine that is busy."""
THREADS = 2


class Grammar:
    """A compiled schema, which any number of sequences follow."""

    def __init__(self, matcher: LLMatcher, eos: frozenset[int]) -> None:
        self._matcher = matcher
        self._eos = eos

    def begin(self, prompt_tokens: int) -> "Progress":
        """Where a sequence with a prompt of so many tokens begins."""
        return Progress(self._matcher.deep_copy(), self._eos, prompt_tokens)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: a preemption copies what a sequence brought."""
        return self


class Progress:
    """How far one sequence is in its grammar. It belongs to the thread that generates.

    Args:
        matcher: Its own.
        eos: Tokens of which one ends a sequence that cannot go on.
        prompt_tokens: The sequence's true prompt is so long, whatever a preemption calls its initial tokens.
    """

    def __init__(self, matcher: LLMatcher, eos: frozenset[int], prompt_tokens: int) -> None:
        self._matcher = matcher
        self._eos = eos
        self._prompt_tokens = prompt_tokens
        self._seen = prompt_tokens
        self._length = prompt_tokens
        self._dead_end: tuple[int, str] | None = None  # written once, with the token that could not be chosen

    def update(self, initial: Sequence[int], generated: Sequence[int]) -> None:
        """Take each token that is new of a sequence that is `initial + generated`."""
        self._length = len(initial) + len(generated)
        new = unseen(initial, generated, self._seen)
        self._seen += len(new)
        if new:
            self._matcher.consume_tokens(new)

    def allowed(self) -> bytes:
        """One bit for each token, the lowest first. Where nothing is allowed it is the end of sequence."""
        mask = self._matcher.compute_bitmask()
        if not self._matcher.is_error():
            return mask
        if self._dead_end is None:
            reason = self._matcher.get_error().partition("\n")[0]
            self._dead_end = (self._length - self._prompt_tokens, reason)
        ending = min(self._eos)
        return (1 << ending).to_bytes(len(mask), "little")

    def check(self, count: int) -> None:
        """Raise for a sequence that could not go on to its first `count` new tokens. In any thread.

        The matcher is not asked: a sequence that a stop string has ended may be in one more step, which holds it.

        Raises:
            Failed: with the reason.
        """
        if self._dead_end is not None and self._dead_end[0] < count:
            raise Failed(f"the answer could not be continued under its response_format: {self._dead_end[1]}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: a preemption copies what a sequence brought, and goes on with the copy."""
        return self


def restrict(scores: Tensor, rows: Sequence[tuple[int, Progress]]) -> None:
    """Set to minus infinity, in place, the logits of `scores` [B, V] that the given rows' grammars do not allow."""
    masks = bytearray(b"".join(progress.allowed() for _, progress in rows))
    # As bits to the device, for an eighth of the transfer.
    packed = torch.frombuffer(masks, dtype=torch.uint8).view(len(rows), -1).to(scores.device)
    bits = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=scores.device)
    allowed = bits.bitwise_and_(1).bool().flatten(1)[:, : scores.size(-1)]
    where = torch.tensor([row for row, _ in rows], device=scores.device)
    scores[where] = scores[where].masked_fill(~allowed, -torch.inf)


class Grammars:
    """Compiles schemas for one model, each once, beside the event loop.

    Args:
        tokenizer: The model's.
        vocabulary: The model's token ids are below this.
        eos: Each of these tokens ends a sequence.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, eos: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._eos = eos
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="grammar")
        self._known: OrderedDict[str, asyncio.Future[Grammar | str]] = OrderedDict()
        self._tokens: LLTokenizer | None = None

    async def compiled(self, schema: Mapping[str, Any]) -> Grammar:
        """The grammar of a JSON schema. Call it on one event loop only.

        Raises:
            BadRequest: it is too large or too costly, or it says what cannot be guaranteed; the message says what.
            Unavailable: the engine is stopping, or the machine too busy to tell.
        """
        text = json.dumps(schema, separators=(",", ":"))
        if len(text) > MAX_CHARACTERS:
            raise _refused(f"the schema has {len(text)} characters; at most {MAX_CHARACTERS} are allowed")
        known = self._known.get(text)
        if known is None:
            known = asyncio.get_running_loop().run_in_executor(self._pool, self._compile, text)
            self._known[text] = known
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(text)
        try:
            grammar = await asyncio.shield(known)  # others may wait for it too
        except asyncio.CancelledError:
            if known.cancelled():
                raise Unavailable("the engine is ending") from None
            raise
        except Exception:
            self._known.pop(text, None)  # no process could be started, or none was in time: no fault of the schema
            raise
        if isinstance(grammar, str):
            raise _refused(grammar)
        return grammar

    def stop(self) -> None:
        """Compile no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, schema: str) -> Grammar | str:
        """In a thread. The grammar, or why there is none."""
        if not self._eos:
            return "the model has no token that ends an answer"
        if fault := _check(schema):
            return fault
        if self._tokens is None:
            try:
                self._tokens = self._wrapped()
            except ValueError as exc:
                return f"the model's tokenizer cannot be used for it: {exc}"
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=grammar_check.OPTIONS)
        matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=grammar_check.limits())
        first = matcher.deep_copy()
        first.compute_bitmask()
        # The first step can fail on what compiles: a schema that refers to itself alone allows nothing.
        failed = next((one for one in (matcher, first) if one.is_error()), None)
        return Grammar(matcher, self._eos) if failed is None else _reason(failed.get_error())

    def _wrapped(self) -> LLTokenizer:
        size = len(self._tokenizer)
        if size > self._vocabulary:
            raise ValueError(f"it has {size} tokens, the model {self._vocabulary}")
        return from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=sorted(self._eos))  # type: ignore[arg-type]


def _check(schema: str) -> str:
    """What is wrong with a schema; empty: nothing.

    Raises:
        Unavailable: the machine is too busy to tell.
    """
    # -P: the folder of the script holds modules whose names the standard library has too.
    command = [sys.executable, "-P", str(Path(grammar_check.__file__))]
    try:
        done = subprocess.run(command, input=schema.encode(), capture_output=True, check=False, timeout=CHECK_SECONDS)  # noqa: S603  # our own file
    except subprocess.TimeoutExpired:
        raise Unavailable("the schema could not be checked in time") from None
    return "the schema is too complex to be compiled" if done.returncode else _reason(done.stdout.decode())


def _reason(error: str) -> str:
    return error.partition("\n<non-verbose")[0].strip()[:400]


def _refused(reason: str) -> BadRequest:
    return BadRequest(f"response_format: {reason}", param="response_format")
