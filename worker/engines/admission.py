"""What stands before a model: a body is admitted as a whole or refused by name. No torch.

transformers' continuous batching ends every request in flight when one of them asks for what it cannot do (a token id
outside the vocabulary, more tokens than its cache holds), so nothing reaches it that these functions have not passed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rejoinder.schemas.openai import BODIES, ChatCompletionRequest, CompletionRequest
from rejoinder.schemas.problems import Model, Problem, check
from rejoinder.worker.engines.protocol import EngineRequest
from rejoinder.worker.errors import BadRequest, Missing, RequestTooLarge

COMPLETION_TOKENS = 16
"""OpenAI's default for `/v1/completions`."""
MAX_CHARACTERS_PER_TOKEN = 256
"""Above any vocabulary's longest token: a text with more characters per allowed token is refused without tokenizing it,
which would take seconds and gigabytes for a text of 100 MB."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one sequence of a loaded model can be. All in tokens."""

    sequence: int
    """Prompt and new tokens together: the smaller of the model's context, the configured limit and the KV cache."""
    vocabulary: int
    """Token ids are below this."""
    default_max_tokens: int
    """New tokens of a chat completion whose body does not say."""
    dynamic: bool = True
    """Whether each step knows what was said so far, as penalties, grammars and log-probabilities need."""
    separate: bool = False
    """Whether `sequence` is for the prompt and for the new tokens each: an encoder reads the one, a decoder writes the
    others."""

    @property
    def prompt(self) -> int:
        """The longest prompt."""
        return self.sequence if self.separate else self.sequence - 1


def parse_body(path: str, body: Any) -> CompletionRequest | ChatCompletionRequest:
    """The body as its path's model.

    Raises:
        Missing: no such path.
        BadRequest: the body breaks a rule; `param` names the field.
    """
    model = BODIES.get(path)
    if model is None:
        raise Missing(f"{path} is not served; {' and '.join(BODIES)} are", param="path")
    return checked(model, body)


def checked(model: type[Model], body: Any) -> Model:
    """The body as `model`.

    Raises:
        BadRequest: it breaks a rule; `param` names the field.
    """
    try:
        return check(model, body)
    except Problem as exc:
        raise BadRequest(str(exc), param=exc.param) from exc


def no_stream(request: EngineRequest, what: str) -> None:
    """Refuse a stream of what comes in one piece.

    Raises:
        BadRequest: the request asks for one.
    """
    if request.emit is not None:
        raise BadRequest(
            f"options.stream is not supported for {what}: leave it out or set it to false", param="options.stream"
        )


def served_name(asked: str | None, served: Sequence[str]) -> str:
    """The model name that the response carries: the one asked for, or the first one served.

    Raises:
        Missing: the name is not served.
    """
    if asked is None:
        return served[0]
    if asked not in served:
        names = ", ".join(repr(name) for name in served)
        raise Missing(f"the model {asked!r} is not served here; {names} is", param="model", code="model_not_found")
    return asked


def check_text(text: str, limits: Limits, param: str) -> None:
    """Refuse a text that cannot fit whatever its tokens are.

    Raises:
        RequestTooLarge: it is that long.
    """
    if len(text) > limits.sequence * MAX_CHARACTERS_PER_TOKEN:
        raise _too_long(f"{param} has {len(text)} characters", limits, param)


def check_tokens(tokens: Sequence[int], limits: Limits, param: str) -> None:
    """Refuse a prompt that the model must not see.

    Raises:
        BadRequest: there is no token, or one is outside the vocabulary.
        RequestTooLarge: no new token would fit behind it.
    """
    check_vocabulary(tokens, limits.vocabulary, param)
    if len(tokens) > limits.prompt:
        raise _too_long(f"{param} has {len(tokens)} tokens", limits, param)


def check_vocabulary(tokens: Sequence[int], vocabulary: int, param: str) -> None:
    """Refuse token ids that the model does not have.

    Raises:
        BadRequest: there is no token, or one is not below `vocabulary`.
    """
    if not tokens:
        raise BadRequest(f"{param} has no tokens: it must have at least one", param=param)
    if max(tokens) >= vocabulary or min(tokens) < 0:
        bad = next(token for token in tokens if not 0 <= token < vocabulary)
        raise BadRequest(
            f"{param}: the token id {bad} is outside the model's vocabulary; ids are 0 to {vocabulary - 1}",
            param=param,
        )


def _too_long(what: str, limits: Limits, param: str) -> RequestTooLarge:
    room = "are allowed" if limits.separate else f"leave room for an answer within the limit of {limits.sequence}"
    return RequestTooLarge(
        f"{what}; at most {limits.prompt} tokens {room}",
        param=param,
        code="context_length_exceeded",
    )


def new_tokens(request: CompletionRequest | ChatCompletionRequest, prompt_tokens: int, limits: Limits) -> int:
    """How many tokens may be generated for a prompt of `prompt_tokens`, which `check_tokens` has passed.

    Raises:
        BadRequest: the body asks for more than fits; the message says how many would.
    """
    room = limits.sequence if limits.separate else limits.sequence - prompt_tokens
    asked = request.max_new_tokens
    if asked is None:
        default = COMPLETION_TOKENS if isinstance(request, CompletionRequest) else limits.default_max_tokens
        return min(default, room)
    if asked > room:
        param = "max_completion_tokens" if getattr(request, "max_completion_tokens", None) else "max_tokens"
        raise BadRequest(
            f"{param} is {asked}, but behind a prompt of {prompt_tokens} tokens at most {room} fit within the limit of"
            f" {limits.sequence} tokens",
            param=param,
            code="context_length_exceeded",
        )
    return asked


def check_sampling(request: CompletionRequest | ChatCompletionRequest, limits: Limits) -> None:
    """Refuse what a body within its ranges asks of sampling, and this model or engine cannot do.

    Raises:
        BadRequest: a token to stop at is outside the vocabulary, alternatives are asked for without log-probabilities,
            or something that needs `Limits.dynamic`.
    """
    bad = next((token for token in request.stop_token_ids or () if token >= limits.vocabulary), None)
    if bad is not None:
        raise BadRequest(
            f"stop_token_ids: the token id {bad} is outside the model's vocabulary; ids are 0 to"
            f" {limits.vocabulary - 1}",
            param="stop_token_ids",
        )
    if getattr(request, "top_logprobs", None) and request.alternatives is None:
        raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    if limits.dynamic:
        return
    neutral = {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
    asked = next((name for name, value in neutral.items() if getattr(request, name) not in {None, value}), None)
    if asked is not None:
        raise _static(asked, f"leave it out or set it to {neutral[asked]}")
    if request.alternatives is not None:
        raise _static("logprobs", "leave it out")
    if request.json_schema is not None:
        raise _static("response_format", "leave it out")


def _static(param: str, remedy: str) -> BadRequest:
    return BadRequest(
        f"{param} is not supported by this worker, whose steps are CUDA graphs, compiled or asynchronous: {remedy}",
        param=param,
    )


def top_k(request: CompletionRequest | ChatCompletionRequest, vocabulary: int) -> int:
    """The number of likeliest tokens to choose from; 0 where that is all of them."""
    return request.top_k if 0 < request.top_k < vocabulary else 0
