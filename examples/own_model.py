r"""A function with a model of its own: any causal language model of transformers, in whole answers and in streams.

`init` loads it from what `--app-params` says, once in each process, on the device that the worker gives it. Both
functions take the same path: a request with `options.stream` gets the second. A request that was cancelled, or ran out
of time, ends within a token (`context.cancelled`).

    MODEL=HuggingFaceTB/SmolLM2-135M-Instruct
    rejoinder worker --app-dir examples --app own_model --app-params "{\"model\": \"$MODEL\", \"max_tokens\": 20}" \
        --requests 'sqlite:///work.db?queue=requests' --responses 'sqlite:///work.db?queue=responses' &
    rejoinder publish --requests 'sqlite:///work.db?queue=requests' examples/own_model.jsonl
    rejoinder join examples/own_model.jsonl 'sqlite:///work.db?queue=responses'

For many requests at once rejoinder's own engine (`--model`) is the faster way; this one is for models that it does not
run, with SmolLM2 in their place.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import BaseModel, Field
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList, TextIteratorStreamer

from rejoinder.worker.functions import Context, generate, generate_stream, init


class Deployment(BaseModel):
    """The custom object, `--app-params`."""

    model: str
    """A directory, or the name of a hub repository."""
    max_tokens: int = 200


class Question(BaseModel):
    """The body of a request."""

    question: str
    max_tokens: int | None = Field(default=None, ge=1)


class Speaker:
    """The model, and how it is asked."""

    def __init__(self, deployment: Deployment, device: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(deployment.model)
        model: Any = AutoModelForCausalLM.from_pretrained(deployment.model)
        self.model = model.to(device).eval()
        self.max_tokens = deployment.max_tokens

    def generate(self, question: Question, context: Context, streamer: Any = None) -> str:
        """The answer, in the calling thread."""
        chat = [{"role": "user", "content": question.question}]
        inputs = self.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        output = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=min(question.max_tokens or self.max_tokens, self.max_tokens),
            stopping_criteria=StoppingCriteriaList([lambda *_, **__: context.cancelled]),
            streamer=streamer,
        )
        return str(self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@init
def load(deployment: Deployment, context: Context) -> Speaker:
    """Runs once in each process, before it is ready."""
    return Speaker(deployment, context.device)


@generate("/answer", concurrency=1)
def answer(question: Question, state: Speaker, context: Context) -> dict[str, str]:
    """The whole answer in one response."""
    return {"answer": state.generate(question, context)}


@generate_stream("/answer", concurrency=1)
def stream(question: Question, state: Speaker, context: Context) -> Iterator[str]:
    """The words as they come."""
    streamer: Any = TextIteratorStreamer(state.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(state.generate, question, context, streamer)
        running.add_done_callback(lambda _: streamer.end())  # also where it failed: nobody waits for ever
        yield from filter(None, streamer)
        running.result()
