"""The bodies of `/v1/embeddings` and `/v1/rerank`.

Sources: the OpenAI API reference, as the `openai` package types it, and the rerank API that Cohere, Jina and vLLM
share. Strict, as `rejoinder.schemas.openai` is.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from rejoinder.schemas.openai import Text, TokenIds
from rejoinder.schemas.problems import Strict

MAX_INPUTS = 2048
"""Inputs or documents in one request: OpenAI's own limit."""


class EmbeddingRequest(Strict):
    """The body of `/v1/embeddings`."""

    RULES: ClassVar[Mapping[str, str]] = {
        "input": "must be a non-empty string, a list of non-empty strings, a list of token ids, or a list of lists of"
        f" token ids; at most {MAX_INPUTS} inputs",
        "encoding_format": 'must be "float" or "base64"',
        "dimensions": "must be an integer from 1 to the model's own number of dimensions",
    }
    """What to say of a field whose own validation error would not help."""

    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
    ) = Field(description="Texts get the model's special tokens; token ids are taken as they are.")
    model: str | None = Field(default=None, description="One of the worker's served names; absent: its model.")
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="base64: of the vector's float32 values, little-endian."
    )
    dimensions: int | None = Field(
        default=None, ge=1, description="Keep the first so many values, normalized again. Absent: all."
    )
    user: str | None = Field(default=None, description="Ignored.")

    @property
    def inputs(self) -> list[str | list[int]]:
        """The inputs one by one, each a text or its token ids."""
        given: Any = self.input
        if isinstance(given, str) or isinstance(given[0], int):
            return [given]
        return list(given)


class RerankDocument(Strict):
    """A document as an object."""

    text: Text


class RerankRequest(Strict):
    """The body of `/v1/rerank`."""

    RULES: ClassVar[Mapping[str, str]] = {
        "documents": 'must be a list of non-empty strings or of objects {"text": "..."}, from 1 to'
        f" {MAX_INPUTS} documents",
    }
    """What to say of a field whose own validation error would not help."""

    query: Text
    documents: Annotated[list[Text | RerankDocument], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
    model: str | None = Field(default=None, description="One of the worker's served names; absent: its model.")
    top_n: int | None = Field(default=None, ge=1, description="Results at most. Absent: one for each document.")
    return_documents: bool = Field(default=False, description="Put each document's text into its result.")
    user: str | None = Field(default=None, description="Ignored.")

    @property
    def texts(self) -> list[str]:
        """The documents' texts."""
        return [document if isinstance(document, str) else document.text for document in self.documents]
