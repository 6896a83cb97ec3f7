"""`rejoinder worker`: pull requests, run the model, publish responses."""

from pathlib import Path
from typing import Any

from rejoinder.cli.errors import ExitCode, Failure
from rejoinder.cli.options import with_settings
from rejoinder.worker.errors import EngineGone
from rejoinder.worker.logs import configure
from rejoinder.worker.service import run
from rejoinder.worker.settings import SettingsError, resolve


@with_settings
def worker(config: Path | None, flags: dict[str, Any]) -> None:
    """Pull requests, run the model, publish responses.

    Every option can also stand in rejoinder.toml or, as REJOINDER_<NAME>, in the environment. SIGTERM stops it
    cleanly: running requests finish, the rest goes back to the queue; a second SIGTERM hands everything back now.
    """
    try:
        settings = resolve(flags, config=config).settings
        if settings.requests == settings.responses:
            where = f"responses: {settings.responses!r} is where requests come from"
            raise SettingsError(f"{where}: answers would be taken for requests")
        configure(settings.log_format, settings.log_level)
        run(settings)
    except SettingsError as exc:
        raise Failure(str(exc), ExitCode.USAGE) from exc
    except EngineGone as exc:
        raise Failure(str(exc)) from exc
