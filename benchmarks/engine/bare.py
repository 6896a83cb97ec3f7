"""The bare side: transformers' `generate_batch` in this process, with the worker's sizes and its own attention."""

import time
from typing import Any

from benchmarks.engine.loads import Prompt


def settings_of(model: str) -> Any:
    """The engine's own settings for a model's directory."""
    from rejoinder.worker.engines.factory import transformers_config
    from rejoinder.worker.engines.transformers.settings import TransformersSettings
    from rejoinder.worker.settings import Settings

    config = transformers_config(Settings(requests="memory://a", responses="memory://b", model=model))
    del config["cache"]
    return TransformersSettings(**config)


def run(model: str, requests: list[Prompt]) -> dict[str, Any]:
    """Seconds, by the clock and of the processor, from the first request to the last result, and how many tokens."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    from rejoinder.worker.engines.transformers.continuous import ContinuousBatch
    from rejoinder.worker.engines.transformers.loading import load

    settings = settings_of(model)
    sizes = ContinuousBatch(load(settings), settings)._manager.continuous_batching_config
    loaded = load(settings)  # anew: the engine puts its own attention into a model, and this is without it
    config = ContinuousBatchingConfig(
        num_blocks=sizes.num_blocks,
        max_batch_tokens=sizes.max_batch_tokens,
        page_size=sizes.page_size,
        max_requests_per_batch=sizes.max_requests_per_batch,
        auto_switch_to_flash=False,
    )
    generation = GenerationConfig(do_sample=False, eos_token_id=sorted(loaded.eos), pad_token_id=min(loaded.eos))
    call = {"generation_config": generation, "continuous_batching_config": config, "persistent_manager": True}
    loaded.model.generate_batch([request.ids for request in requests[:2]], max_new_tokens=2, **call)
    limits = {request.max_tokens for request in requests}
    began, processor = time.perf_counter(), time.process_time()
    if len(limits) == 1:
        results = loaded.model.generate_batch([r.ids for r in requests], max_new_tokens=limits.pop(), **call)
        tokens = [len(result.generated_tokens) for result in results.values()]
    else:
        tokens = _each_its_own(loaded.model, requests, call)
    processor = time.process_time() - processor
    return {"seconds": time.perf_counter() - began, "processor": processor, "tokens": sum(tokens)}


def _each_its_own(model: Any, requests: list[Prompt], call: dict[str, Any]) -> list[int]:
    """What `generate_batch` does, but for its one limit for all."""
    with model.continuous_batching_context_manager(**call) as manager:
        for request in requests:
            manager.add_request(request.ids, max_new_tokens=request.max_tokens)
        tokens: list[int] = []
        while len(tokens) < len(requests):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                tokens.append(len(result.generated_tokens))
    return tokens
