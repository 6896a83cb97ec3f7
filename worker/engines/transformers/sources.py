"""Where a model's artefacts come from: a directory, or one commit of a repository on the hub. No pickles."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
from transformers.utils.hub import cached_file, resolve_revision

from rejoinder.worker.engines.transformers import lora
from rejoinder.worker.engines.transformers.settings import TransformersSettings
from rejoinder.worker.errors import EngineGone

_known: dict[tuple[str, str | None], Any] = {}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def pinned(what: str, name: str, revision: str | None, offline: bool, commits: dict[str, str]) -> dict[str, Any]:
    """Where an artefact comes from, as `from_pretrained` takes it: what is read of it is all of one commit.

    Args:
        what: The setting that names it.
        name: A directory, or a repository on the hub.
        revision: As the settings have it.
        offline: Whether to look at this machine's cache only.
        commits: Gets the commit, under `what`. A directory has none.

    Raises:
        EngineGone: a directory is to have a revision.
    """
    if offline:
        # Each call is told too. This is for those that libraries make by themselves, in the whole process.
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    if Path(name).is_dir():
        if revision is not None:
            raise EngineGone(f"the {what} {name!r} is a directory: it has no revision {revision!r}")
        return {"local_files_only": offline}
    # Once in a process: what the task is read from and what is loaded are of one commit, even if a branch moves.
    resolved = _known.get((name, revision)) or resolve_revision(name, revision, local_files_only=offline)
    if commit := getattr(resolved, "resolved", None):
        commits[what] = commit
        _known[name, revision] = resolved
    return {"revision": resolved, "local_files_only": offline}


def checkpoint_json(settings: TransformersSettings, name: str) -> Any:
    """The JSON value of one of the checkpoint's files, such as `config.json`; None where there is no such file.

    Raises:
        EngineGone: it cannot be read, or it is no JSON.
    """
    try:
        source = pinned("model", settings.model, settings.revision, settings.offline, {})
        # With the hub away, what is not in the cache counts as missing: a model that is whole there still starts.
        path = cached_file(settings.model, name, _raise_exceptions_for_missing_entries=False, **source)
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise EngineGone(f"{name} of the model {settings.model!r} cannot be read: {advice(exc)}") from exc


def lora_directory(name: str, settings: TransformersSettings, commits: dict[str, str]) -> Path:
    """The directory of the LoRA adapter, which is fetched if it is not there.

    Raises:
        EngineGone: it cannot be had, or is pickled.
    """
    source = pinned("lora", name, settings.lora_revision, settings.offline, commits)
    directory = Path(name)
    if not directory.is_dir():
        try:
            files = [lora.CONFIG, lora.WEIGHTS]
            directory = Path(huggingface_hub.snapshot_download(name, allow_patterns=files, **source))
        except (OSError, ValueError) as exc:
            raise EngineGone(f"the lora adapter {name!r} cannot be loaded: {advice(exc)}") from exc
    lora.check_files(directory, name)
    return directory


def refuse_pickles(model: str) -> None:
    """Say it plainly for a directory; for the hub, transformers says that there is no safetensors file."""
    path = Path(model)
    if not path.is_dir():
        if path.is_absolute() or model.startswith((".", "~")) or path.is_file():
            raise EngineGone(f"the model {model!r} is no directory: give one, or the name of a hub repository")
        return
    if (path / lora.CONFIG).is_file() and not (path / "config.json").is_file():
        raise EngineGone(f"the model {model!r} is an adapter: give its base as model, and this as lora")
    if not any(path.glob("*.safetensors")):
        found = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
        what = f"only {', '.join(found)}, which is pickled and can run anything" if found else "no weights"
        raise EngineGone(
            f"the model {model!r} has {what}: weights must be .safetensors"
            " (save_pretrained writes them, wherever the model can be loaded)"
        )


def advice(exc: Exception) -> str:
    """Why an artefact could not be had, in one line."""
    first = " ".join(str(exc).split())[:400]
    if not isinstance(exc, OSError):
        return f"{type(exc).__name__}: {first}" if isinstance(exc, (KeyError, AttributeError)) else first
    return f"{first} (give a directory, or a hub repository that can be reached from here)"
