"""LocalStack in an environment of its own, made once; and the Pub/Sub emulator, found."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from local_cloud.errors import CloudError
from local_cloud.state import locked

REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"
# Where SQS, SNS and S3 of this version of LocalStack were seen to work. uv takes the first that it finds.
PYTHONS = ">=3.11,<3.14"
EMULATOR = "cloud-pubsub-emulator"
EMULATOR_HELP = (
    "install it with `gcloud components install pubsub-emulator` or, where gcloud came from a package manager, "
    "`apt-get install google-cloud-cli-pubsub-emulator`"
)


def localstack_python() -> Path:
    """Give the Python that has LocalStack installed, and install it first if need be.

    Raises:
        CloudError: it cannot be installed; says why.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rejoinder"
    digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:16]
    home = cache / f"localstack-{digest}"
    python = home / "bin" / "python"
    if not python.exists():
        with locked(cache / "localstack.lock"):
            if not python.exists():
                _install(home)
    return python


def _install(home: Path) -> None:
    """Build the environment under another name and rename it when it is whole: no half of one is ever at `home`."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        raise CloudError("LocalStack is installed by uv, which is not on the PATH: pip install uv")
    print(f"installing LocalStack into {home} (once)", file=sys.stderr, flush=True)  # noqa: T201
    shutil.rmtree(home, ignore_errors=True)
    building = Path(tempfile.mkdtemp(prefix=f"{home.name}.", dir=home.parent))
    try:
        _run(building, uv, "venv", "-q", "--relocatable", "--python", PYTHONS, "venv")
        python = building / "venv" / "bin" / "python"
        _run(building, uv, "pip", "install", "-q", "--require-hashes", "--python", str(python), "-r", str(REQUIREMENTS))
        (building / "venv").rename(home)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _run(folder: Path, *command: str) -> None:
    # In a folder of its own: uv would read the settings of the project that it stands in.
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise CloudError(f"cannot install LocalStack: `{' '.join(command)}` says: {' '.join(lines[-5:])}")


def pubsub_emulator() -> list[str]:
    """Give the command that starts the Pub/Sub emulator, without its arguments.

    The emulator's own script is preferred to `gcloud`, which takes seconds to start it as its child.

    Raises:
        CloudError: the emulator or Java is not installed; says how to install it.
    """
    script = shutil.which(EMULATOR)
    if script is None:
        gcloud = shutil.which("gcloud")
        if gcloud is None:
            raise CloudError(f"no {EMULATOR} and no gcloud on the PATH: install the Google Cloud CLI; {EMULATOR_HELP}")
        found = Path(gcloud).resolve().parents[1] / "platform" / "pubsub-emulator" / "bin" / EMULATOR
        if not found.exists():
            found = _sdk_root(gcloud) / "platform" / "pubsub-emulator" / "bin" / EMULATOR
        if not found.exists():
            raise CloudError(f"gcloud has no Pub/Sub emulator: {EMULATOR_HELP}")
        script = str(found)
    if not os.environ.get("JAVA_HOME") and shutil.which("java") is None:
        raise CloudError("the Pub/Sub emulator needs Java: install a JRE (11 or newer) or set JAVA_HOME")
    return [script]


def _sdk_root(gcloud: str) -> Path:
    """Ask a gcloud that is only a wrapper (snap, Homebrew) where its components are."""
    command = [gcloud, "info", "--format=value(installation.sdk_root)"]
    return Path(subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip() or "/")  # noqa: S603
