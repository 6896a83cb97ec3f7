"""Which body each path takes."""

from collections.abc import Mapping

from pydantic import BaseModel

from rejoinder.schemas import openai
from rejoinder.schemas.embeddings import EmbeddingRequest, RerankRequest

BODIES: Mapping[str, type[BaseModel]] = {
    **openai.BODIES,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/rerank": RerankRequest,
}
