"""Which kind of batch a model runs in."""

import logging

from rejoinder.worker.engines.transformers.batch import Batch
from rejoinder.worker.engines.transformers.continuous import ContinuousBatch
from rejoinder.worker.engines.transformers.loading import LoadedModel
from rejoinder.worker.engines.transformers.settings import TransformersSettings, not_static
from rejoinder.worker.engines.transformers.static import StaticBatch
from rejoinder.worker.errors import EngineGone

log = logging.getLogger(__name__)


def choose_batch(loaded: LoadedModel, settings: TransformersSettings) -> Batch:
    """The batch that the settings ask for, or that the model needs: then the log says why.

    Raises:
        EngineGone: it cannot be; the message says why.
    """
    why = _not_continuous(loaded)
    if settings.batching == "continuous" and why:
        raise EngineGone(f"batching is continuous, but {settings.model!r} {why}: set batching to auto")
    if settings.batching == "auto" and why is None:
        attention = loaded.model.config._attn_implementation
        try:
            return ContinuousBatch(loaded, settings)
        except EngineGone as exc:
            # Otherwise it is the memory, or what was asked for that is in the way, and not the model.
            of_the_model = isinstance(exc.__cause__, (ValueError, AttributeError, KeyError))
            if not of_the_model or settings.attn in {"varlen", "flash"} or not_static(settings):
                raise
            why = str(exc)
            loaded.model.set_attn_implementation(attention)
    if settings.batching == "continuous":
        return ContinuousBatch(loaded, settings)
    if why:
        if unheeded := not_static(settings):
            raise EngineGone(f"{settings.model!r} {why}, so it runs by static batching, but {unheeded}")
        log.warning("%s %s: it runs by static batching", settings.model, why)
    return StaticBatch(loaded, settings)


def _not_continuous(loaded: LoadedModel) -> str | None:
    """What of the model keeps it from continuous batching, which pages the cache of attention and knows no other."""
    if loaded.model.config.is_encoder_decoder:
        return "is an encoder-decoder"
    if loaded.model._is_stateful:
        return "keeps a state instead of a cache of all tokens"
    return None
