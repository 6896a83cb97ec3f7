"""What runs sequences on a model together. The engine above it knows bodies and text; a batch knows token ids."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from rejoinder.worker.engines.transformers_sampling import Sampling

CPU_RUNNING = 32
GPU_RUNNING = 256


@dataclass(frozen=True, slots=True)
class Generated:
    """What was generated of one sequence."""

    tokens: list[int]
    """The one that ended it included."""


class Batch(Protocol):
    """Sequences of one model that run together. All methods but `start` and `stop` are called on the event loop."""

    @property
    def running(self) -> int:
        """Sequences at once, at most."""

    @property
    def ahead(self) -> int:
        """Sequences to admit beyond `running`: they wait at its door, so that free places are filled at once."""

    @property
    def longest(self) -> int:
        """Tokens of one sequence, prompt and new ones together, at most."""

    @property
    def penalties(self) -> bool:
        """Whether sequences may have penalties."""

    @property
    def alive(self) -> bool:
        """Whether it runs and takes sequences. Once it is not it never is again."""

    @property
    def steps(self) -> int:
        """Steps of the model done."""

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
