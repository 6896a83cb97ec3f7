"""Which engine the settings ask for."""

from rejoinder.worker.engines.echo import EchoEngine
from rejoinder.worker.engines.host import EngineProcess
from rejoinder.worker.engines.protocol import Engine
from rejoinder.worker.settings import Settings


def create_engine(settings: Settings) -> Engine:
    """The engine of the settings, not yet started. Imports no torch: the model's process does."""
    if settings.engine_name == "echo":
        return EchoEngine(settings.default_path)
    return EngineProcess("rejoinder.worker.engines.transformers:create", {})
