"""What runs sequences on a model together. The engine above it knows bodies and text; a batch knows token ids."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rejoinder.worker.engines.protocol import EngineStats
from rejoinder.worker.engines.transformers.grammar import Progress
from rejoinder.worker.engines.transformers.logprobs import Record, TokenLogprob
from rejoinder.worker.engines.transformers.sampling import Sampling

CPU_RUNNING = 32
GPU_RUNNING = 256


@dataclass(frozen=True, slots=True)
class Generated:
    """What was generated of one sequence."""

    tokens: list[int]
    """The one that ended it included."""
    logprobs: list[TokenLogprob] | None = None
    """Of each token, where the sampling asks for them."""


def generated(tokens: list[int], brought: Mapping[str, Any]) -> Generated:
    """What was generated of a sequence that brought what `sampling.followed` says.

    Raises:
        Failed: its grammar left one of them no choice.
    """
    progress: Progress | None = brought.get("progress")
    if progress is not None:
        progress.check(len(tokens))
    record: Record | None = brought.get("record")
    return Generated(tokens, None if record is None else record.first(len(tokens)))


class Batch(Protocol):
    """Sequences of one model that run together. All methods but `start` and `stop` are called on the event loop."""

    @property
    def running(self) -> int:
        """Sequences at once, at most."""

    @property
    def fits(self) -> int:
        """Sequences at once that there is memory for, judged by those seen lately: 1 to `running`."""

    @property
    def ahead(self) -> float:
        """Sequences to admit beyond those that fit, as a share of them: those at its door fill free places at once."""

    @property
    def longest(self) -> int:
        """Tokens of one sequence, prompt and new ones together, at most."""

    @property
    def dynamic(self) -> bool:
        """Whether each step sees its sequences as they are: penalties, grammars and log-probabilities need it."""

    @property
    def alive(self) -> bool:
        """Whether it runs and takes sequences. Once it is not it never is again."""

    @property
    def steps(self) -> int:
        """Steps of the model done."""

    @property
    def stats(self) -> EngineStats:
        """What it has done."""

    def start(self) -> None:
        """Start the thread that generates. It is no daemon: `stop` it."""

    def stop(self) -> None:
        """End that thread; sequences in flight raise `Unavailable`. Blocks."""

    async def run(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        stop: Callable[[list[int]], bool] | None = None,
        stop_tokens: Collection[int] = (),
    ) -> Generated:
        """Generate one sequence; cancelling takes it out of the batch.

        Args:
            prompt: Token ids, admitted.
            max_new_tokens: Admitted.
            sampling: How its tokens are chosen.
            stop: Called on the event loop with all tokens so far after each; true ends the sequence there.
            stop_tokens: Each ends the sequence as the model's own end-of-sequence tokens do.

        Raises:
            Unavailable: the batch has ended.
            Failed: this sequence alone failed.
        """
