"""A function that does nothing: what is measured with it is everything else."""

from typing import Any

from rejoinder.worker.functions import generate_batch


@generate_batch("/nothing")
def nothing(bodies: list[Any]) -> list[Any]:
    """Each body is its answer."""
    return bodies
