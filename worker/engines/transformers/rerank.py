"""The engine for cross-encoders: `/v1/rerank`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from rejoinder.schemas.embeddings import RerankRequest
from rejoinder.worker.engines.admission import check_vocabulary, checked, served_name
from rejoinder.worker.engines.length_pool import Tokens
from rejoinder.worker.engines.protocol import EngineRequest
from rejoinder.worker.engines.transformers.forward import Forward
from rejoinder.worker.engines.transformers.pooling import (
    PoolingEngine,
    check_length,
    check_text,
    encode,
    load_pooling,
    padding_id,
)
from rejoinder.worker.engines.transformers.settings import TransformersSettings
from rejoinder.worker.engines.transformers.sources import checkpoint_json
from rejoinder.worker.errors import EngineGone

PATH = "/v1/rerank"
ARCHITECTURE = "ForSequenceClassification"
ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Sigmoid": torch.sigmoid,
    "Identity": torch.clone,
}


class RerankEngine(PoolingEngine):
    """An `Engine` for one cross-encoder in this process.

    A document's score is the sigmoid of the model's one logit, or what the checkpoint names in its place, as
    sentence-transformers' `CrossEncoder` does.
    """

    def __init__(self, settings: TransformersSettings) -> None:
        super().__init__(settings, PATH)

    def _load(self) -> Forward:
        activation = _activation(self._settings)
        loaded = self._loaded = load_pooling(AutoModelForSequenceClassification, self._settings)
        if loaded.model.config.num_labels != 1:
            raise EngineGone(
                f"the model {self._settings.model!r} has {loaded.model.config.num_labels} labels: rerank needs a"
                " cross-encoder, which has one"
            )
        filler = padding_id(loaded.model, loaded.tokenizer)
        if filler is None:
            raise EngineGone(f"the model {self._settings.model!r} has no padding token, so it cannot run in batches")
        loaded.model.config.get_text_config().pad_token_id = filler  # decoders find their last token by it

        @torch.inference_mode()
        def forward(batch: Sequence[Tokens]) -> torch.Tensor:
            return activation(loaded.model(**loaded.inputs(batch)).logits.float()).cpu()

        return forward

    async def _answer(self, request: EngineRequest) -> Any:
        body = checked(RerankRequest, request.body)
        model = served_name(body.model, self._served)
        texts = body.texts
        pairs = await self._in_thread(lambda: self._pairs(body.query, texts))
        scores = [float(f"{row.item():.9g}") for row in await self._rows(pairs)]
        ranked = sorted(range(len(texts)), key=lambda index: (-scores[index], index))
        tokens = sum(len(pair.ids) for pair in pairs)
        return {
            "id": f"rerank-{request.response_id}",
            "model": model,
            "results": [
                {"index": index, "relevance_score": scores[index]}
                | ({"document": {"text": texts[index]}} if body.return_documents else {})
                for index in ranked[: body.top_n]
            ],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    def _pairs(self, query: str, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of the query with each document, admitted."""
        check_text(len(query), self._loaded, "query")
        for at, text in enumerate(texts):
            check_text(len(text), self._loaded, f"documents.{at}")
        pairs: list[Tokens] = []
        # The first alone: a query that is too long is not tokenized with thousands of documents, which takes gigabytes.
        for some in (texts[:1], texts[1:]):
            for pair in encode(self._loaded, [query] * len(some), some) if some else ():
                param = f"documents.{len(pairs)}"
                check_vocabulary(pair.ids, self._loaded.vocabulary, param)  # blanks may have no token at all
                check_length(pair, self._loaded, param, f"{param} with the query")
                pairs.append(pair)
        return pairs


def create(config: Mapping[str, Any]) -> RerankEngine:
    """The engine for a config of `TransformersSettings`. Nothing is loaded yet.

    Raises:
        pydantic.ValidationError: the config breaks a rule.
    """
    return RerankEngine(TransformersSettings.model_validate(dict(config)))


def _activation(settings: TransformersSettings) -> Callable[[torch.Tensor], torch.Tensor]:
    """From the logit to the score; looked at before any weight is loaded."""
    config = checkpoint_json(settings, "config.json") or {}
    if not any(name.endswith(ARCHITECTURE) for name in config.get("architectures") or ()):
        # transformers would put a random head on any other checkpoint.
        raise EngineGone(f"the model {settings.model!r} is no {ARCHITECTURE}, so it has no scores to rerank by")
    own = (config.get("sentence_transformers") or {}).get("activation_fn")
    name = str(own or config.get("sbert_ce_default_activation_function") or "Sigmoid").rpartition(".")[2]
    if name not in ACTIVATIONS:
        raise EngineGone(
            f"the model {settings.model!r} makes its scores by {name}; {' and '.join(ACTIVATIONS)} are served"
        )
    return ACTIVATIONS[name]
