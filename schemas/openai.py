"""The OpenAI bodies that are served: text completions and chat completions.

Source: the OpenAI API reference, as the `openai` package types it; `top_k`, `min_p`, `repetition_penalty` and
`stop_token_ids` are vLLM's additions. Strict: nothing is coerced, every range is checked, and a field or value that no
engine here can honour is refused by name instead of ignored. A field with a neutral value (`best_of: 1`,
`logit_bias: {}`) is accepted, since clients send those unasked.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from rejoinder.schemas.problems import Strict

MAX_SEQUENCES = 128
"""Prompts times `n` in one request: bounds what a single message can ask of a shared engine."""
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_TEMPERATURE = 2.0
MAX_PENALTY = 2.0
MAX_LOGPROBS = 20
"""The likeliest tokens that are told at each place, at most: OpenAI's own for chat, vLLM's for both."""

# fail_fast: a list of a million wrong items is one error, not a million.
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Alternatives = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Penalty = Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY, allow_inf_nan=False)]

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
PROMPT_RULE = "a non-empty string, a list of non-empty strings, a list of token ids, or a list of lists of token ids"


class Sampling(Strict):
    """What both bodies share: how many tokens, and how each is chosen."""

    RULES: ClassVar[Mapping[str, str]] = {
        "stop": f"must be a non-empty string or a list of at most {MAX_STOPS}, each of at most"
        f" {MAX_STOP_CHARACTERS} characters",
        "stream": "is not supported in the body: leave it out, and set options.stream of the request to true",
        "stop_token_ids": f"must be a list of at most {MAX_STOPS} token ids",
        "logit_bias": "is not supported: leave it out",
    }
    """What to say of a field whose own validation error would not help."""

    model: str | None = Field(default=None, description="One of the worker's served names; absent: its model.")
    max_tokens: int | None = Field(default=None, ge=1, description="New tokens at most, for each choice.")
    temperature: float = Field(
        default=1.0, ge=0.0, le=MAX_TEMPERATURE, allow_inf_nan=False, description="0 is greedy: the likeliest token."
    )
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=-1, description="0 and -1 are off.")
    min_p: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        allow_inf_nan=False,
        description="Least probability, as a share of the likeliest token's, after temperature and before top_k and"
        " top_p. 0 is off.",
    )
    repetition_penalty: float = Field(
        default=1.0,
        gt=0.0,
        le=MAX_PENALTY,
        allow_inf_nan=False,
        description="Divides the positive and multiplies the negative logits of tokens of the prompt and the answer.",
    )
    n: int = Field(default=1, ge=1, le=MAX_SEQUENCES)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS, fail_fast=True)] | None = Field(
        default=None, description="Each ends the answer as the end-of-sequence token does, and is no part of its text."
    )
    seed: int | None = Field(
        default=None, ge=-(2**63), le=2**63 - 1, description="Absent: derived from the response id."
    )
    user: str | None = Field(default=None, description="Ignored.")
    stream: Literal[False] | None = None
    presence_penalty: Penalty | None = Field(
        default=None, description="Subtracted from the logit of each token of the answer so far."
    )
    frequency_penalty: Penalty | None = Field(
        default=None, description="Subtracted from the logit of each token once for each time in the answer so far."
    )
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, none to many."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def json_schema(self) -> Mapping[str, Any] | None:
        """The JSON schema that each choice's text must keep to; None: any text."""
        return None

    @property
    def max_new_tokens(self) -> int | None:
        """New tokens at most for each choice; None: as many as the engine allows."""
        return self.max_tokens


class CompletionRequest(Sampling):
    """The body of `/v1/completions`."""

    RULES: ClassVar[Mapping[str, str]] = {
        **Sampling.RULES,
        "prompt": f"must be {PROMPT_RULE}; at most {MAX_SEQUENCES} prompts",
        "echo": "is not supported: leave it out or set it to false",
        "suffix": "is not supported: leave it out",
        "best_of": "is not supported: leave it out or set it to 1",
        "logprobs": f"must be an integer of 0 to {MAX_LOGPROBS}",
    }

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_SEQUENCES, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_SEQUENCES, fail_fast=True)]
    )
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Literal[1] | None = None
    logprobs: Alternatives | None = Field(
        default=None,
        description="Log-probabilities of the answer's tokens, and of so many likeliest ones at each place.",
    )

    @model_validator(mode="after")
    def _bounded(self) -> "CompletionRequest":
        if len(self.prompts) * self.n > MAX_SEQUENCES:
            raise ValueError(f"prompts times n is {len(self.prompts) * self.n}; at most {MAX_SEQUENCES} is allowed")
        return self

    @property
    def alternatives(self) -> int | None:
        """How many likeliest tokens to tell at each place; None: no log-probabilities."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, each a text or its token ids."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


class TextPart(Strict):
    """A part of a message's content. Only text is served."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]
    name: str | None = Field(default=None, description="Ignored.")

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatCompletionRequest(Sampling):
    """The body of `/v1/chat/completions`."""

    RULES: ClassVar[Mapping[str, str]] = {
        **Sampling.RULES,
        "logprobs": "must be true or false",
        "top_logprobs": f"must be an integer of 0 to {MAX_LOGPROBS}",
        "response_format": 'must be {"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema":'
        ' {"name": of 1 to 64 letters, digits, _ and -, "schema": a JSON schema}}',
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: int | None = Field(default=None, ge=1, description="The newer name of max_tokens.")
    logprobs: bool | None = Field(default=None, description="Log-probabilities of the answer's tokens.")
    top_logprobs: Alternatives | None = Field(
        default=None, description="And of so many likeliest ones at each place. Needs logprobs."
    )
    response_format: "Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator='type')] | None" = None

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatCompletionRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are one limit under two names: give one of them")
        return self

    @property
    def alternatives(self) -> int | None:
        """How many likeliest tokens to tell at each place; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def json_schema(self) -> Mapping[str, Any] | None:
        """The JSON schema that each choice's text must keep to; None: any text."""
        match self.response_format:
            case JsonFormat():
                return ANY_OBJECT
            case SchemaFormat(json_schema=named):
                return ANY_OBJECT if named.given is None else named.given
        return None

    @property
    def max_new_tokens(self) -> int | None:
        """New tokens at most for each choice; None: as many as the engine allows."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class NamedSchema(Strict):
    """A JSON schema that the answer keeps to, strict or not."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$", description="Ignored.")
    description: str | None = Field(default=None, description="Ignored.")
    given: dict[str, Any] | None = Field(default=None, alias="schema", description="Absent: any object.")
    strict: bool | None = Field(default=None, description="The schema is kept to either way.")


class SchemaFormat(Strict):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class JsonFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class TextFormat(Strict):
    """Any text, as without a format."""

    type: Literal["text"]


BODIES: Mapping[str, type[CompletionRequest] | type[ChatCompletionRequest]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
}
