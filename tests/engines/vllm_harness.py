"""What the tests of the vLLM engine share."""

from engine_harness import GREEDY, completion

from rejoinder.worker.engines.factory import create_vllm


async def started_vllm(model, **config):
    engine = create_vllm({"model": str(model), "max_running": 8, **config})
    await engine.start()
    return engine


async def greedy(engine, **body):
    return await engine.generate(completion({**GREEDY, **body}))
