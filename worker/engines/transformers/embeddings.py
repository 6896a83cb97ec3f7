"""The engine for embedding models: `/v1/embeddings`."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.functional import normalize
from transformers import AutoModel

from rejoinder.schemas.embeddings import EmbeddingRequest
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
)
from rejoinder.worker.engines.transformers.settings import TransformersSettings
from rejoinder.worker.engines.transformers.sources import checkpoint_json
from rejoinder.worker.errors import BadRequest, EngineGone

PATH = "/v1/embeddings"
Pooling = Literal["mean", "cls", "last"]
# sentence-transformers' names: the older flag and the newer value of pooling_mode.
MODES: Mapping[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "mean": "mean",
    "cls": "cls",
    "lasttoken": "last",
}


@dataclass(frozen=True, slots=True)
class Head:
    """How a sequence's hidden states become its embedding."""

    pooling: Pooling
    normalize: bool
    prompt: str = ""
    """Goes before each text: the checkpoint's default prompt."""

    def __call__(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pool `[sequences, longest, size]` under the mask `[sequences, longest]`, padded on the right, in float32."""
        lengths = mask.sum(1)
        if self.pooling == "cls":
            pooled = hidden[:, 0].float()
        elif self.pooling == "last":
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1].float()
        else:
            # Not a product with the mask: what padding makes of a not-a-number must not reach the sum.
            kept = hidden.float().masked_fill(mask.unsqueeze(-1) == 0, 0.0)
            pooled = kept.sum(1) / lengths.unsqueeze(-1)
        return normalize(pooled, dim=-1) if self.normalize else pooled


class EmbeddingEngine(PoolingEngine):
    """An `Engine` for one embedding model in this process."""

    def __init__(self, settings: TransformersSettings) -> None:
        super().__init__(settings, PATH)

    def _load(self) -> Forward:
        loaded = self._loaded = load_pooling(AutoModel, self._settings)

        @torch.inference_mode()
        def hidden(batch: Sequence[Tokens]) -> tuple[torch.Tensor, torch.Tensor]:
            arguments = loaded.inputs(batch)
            return loaded.model(**arguments).last_hidden_state, arguments["attention_mask"]

        def looks_ahead() -> bool:
            """Whether a token's state depends on the next token: an encoder's does, a decoder's does not."""
            low, high = 0, loaded.vocabulary - 1
            states, _ = hidden([Tokens([low, low]), Tokens([low, high])])
            return not torch.equal(states[0, 0], states[1, 0])

        head = self._head = _head(self._settings, looks_ahead)
        self._size = int(hidden([Tokens([0])])[0].shape[-1])

        @torch.inference_mode()
        def forward(batch: Sequence[Tokens]) -> torch.Tensor:
            return head(*hidden(batch)).cpu()

        return forward

    async def _answer(self, request: EngineRequest) -> Any:
        body = checked(EmbeddingRequest, request.body)
        model = served_name(body.model, self._served)
        if body.dimensions is not None and body.dimensions > self._size:
            raise BadRequest(
                f"dimensions is {body.dimensions}, but the model's embeddings have {self._size}", param="dimensions"
            )
        sequences = await self._in_thread(lambda: self._sequences(body.inputs))
        rows = await self._rows(sequences)
        return await self._in_thread(lambda: _response(body, model, sequences, rows, again=self._head.normalize))

    def _sequences(self, inputs: Sequence[str | list[int]]) -> list[Tokens]:
        """The tokens of each input, admitted."""
        texts = [one for one in inputs if isinstance(one, str)]
        for at, text in enumerate(texts):
            check_text(len(text), self._loaded, _param(at, inputs))
        if texts:  # all are, or none is
            sequences = encode(self._loaded, [self._head.prompt + text for text in texts])
        else:
            sequences = [Tokens(one) for one in inputs if isinstance(one, list)]
        for at, tokens in enumerate(sequences):
            check_vocabulary(tokens.ids, self._loaded.vocabulary, _param(at, inputs))
            check_length(tokens, self._loaded, _param(at, inputs))
        return sequences


def create(config: Mapping[str, Any]) -> EmbeddingEngine:
    """The engine for a config of `TransformersSettings`. Nothing is loaded yet.

    Raises:
        pydantic.ValidationError: the config breaks a rule.
    """
    return EmbeddingEngine(TransformersSettings.model_validate(dict(config)))


def _head(settings: TransformersSettings, looks_ahead: Callable[[], bool]) -> Head:
    """What the settings say, else the checkpoint's sentence-transformers files, else what suits such a model.

    Raises:
        EngineGone: the checkpoint asks for what is not served; another vector than its own would be no help.
    """
    modules = checkpoint_json(settings, "modules.json")
    paths = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in modules or ()}
    if unknown := sorted(paths.keys() - {"Transformer", "Pooling", "Normalize"}):
        raise EngineGone(f"modules.json of {settings.model!r} names {', '.join(unknown)}, which this engine has not")
    config = checkpoint_json(settings, f"{paths['Pooling']}/config.json") or {} if "Pooling" in paths else {}
    pooling = _pooling(settings, config) or ("mean" if looks_ahead() else "last")
    scaled = settings.normalize if settings.normalize is not None else modules is None or "Normalize" in paths
    prompts = checkpoint_json(settings, "config_sentence_transformers.json") or {} if modules is not None else {}
    prompt = (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name") or "", "")
    if prompt and not config.get("include_prompt", True):
        raise EngineGone(f"{settings.model!r} pools without its prompt's tokens, which this engine cannot")
    return Head(pooling, scaled, prompt)


def _pooling(settings: TransformersSettings, config: Mapping[str, Any]) -> Pooling | None:
    """What the settings, or else the checkpoint's `1_Pooling/config.json`, say; None where neither does."""
    if settings.pooling != "auto":
        return settings.pooling
    named = config.get("pooling_mode") or [key for key in config if key.startswith("pooling_mode_") and config[key]]
    modes = [named] if isinstance(named, str) else list(named)
    if not modes:
        return None
    if len(modes) > 1 or modes[0] not in MODES:
        raise EngineGone(
            f"{settings.model!r} pools by {' and '.join(modes)}; mean, cls and last token alone are served"
        )
    return MODES[modes[0]]


def _param(at: int, inputs: Sequence[Any]) -> str:
    return f"input.{at}" if len(inputs) > 1 else "input"


def _response(
    body: EmbeddingRequest, model: str, sequences: Sequence[Tokens], rows: Sequence[torch.Tensor], *, again: bool
) -> dict[str, Any]:
    vectors = torch.stack(list(rows))
    if body.dimensions is not None:
        vectors = vectors[:, : body.dimensions]
        vectors = normalize(vectors, dim=-1) if again else vectors
    tokens = sum(len(sequence.ids) for sequence in sequences)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _written(vector, body.encoding_format)}
            for index, vector in enumerate(vectors)
        ],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _written(vector: torch.Tensor, encoding: str) -> str | list[float]:
    if encoding == "base64":
        return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode("ascii")
    # Nine digits name every float32; the sixteen that JSON would get of the same number as a double say no more.
    return [float(f"{value:.9g}") for value in vector.tolist()]
