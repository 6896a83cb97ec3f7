"""`localstack/up` and `localstack/down`."""

import argparse
import asyncio
import shlex
import shutil
import sys
from collections.abc import Sequence
from functools import partial

from local_cloud import containers, resources, seed
from local_cloud.errors import CloudError
from local_cloud.services import (
    HOST,
    Running,
    alive,
    localstack,
    localstack_ready,
    pubsub,
    pubsub_ready,
    refuse_taken,
    start,
    stop_group,
    until_ready,
)
from local_cloud.state import State, folder, locked

AWS_PORT = 4566
PUBSUB_PORT = 8085


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `up` or `down`; gives the exit code, 0 for done and 1 for an error, which is one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        with locked(folder() / "lock"):
            up(options) if options.command == "up" else down()
    except (CloudError, OSError) as exc:  # OSError: the folder for state and logs cannot be written
        say(f"localstack/{options.command}: {exc}")
        return 1
    except KeyboardInterrupt:
        say(f"localstack/{options.command}: interrupted")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="localstack", description="The local cloud of SQS, SNS, S3 and Pub/Sub.")
    commands = parser.add_subparsers(dest="command", required=True)
    up_parser = commands.add_parser(
        "up",
        prog="localstack/up",
        description="Bring up LocalStack and the Pub/Sub emulator, create what the examples use, and print the URLs. "
        "What is up stays up. Containers where a Docker engine answers, else processes.",
    )
    how = up_parser.add_mutually_exclusive_group()
    how.add_argument("--containers", dest="mode", action="store_const", const="containers", help="with docker compose")
    how.add_argument("--processes", dest="mode", action="store_const", const="processes", help="without containers")
    up_parser.add_argument("--aws-port", type=_port, metavar="PORT", help=f"of LocalStack (default {AWS_PORT})")
    up_parser.add_argument("--pubsub-port", type=_port, metavar="PORT", help=f"of Pub/Sub (default {PUBSUB_PORT})")
    up_parser.add_argument(
        "--env", action="store_true", help='print only the exports on stdout: eval "$(localstack/up --env)"'
    )
    commands.add_parser("down", prog="localstack/down", description="Take the local cloud down, with all it holds.")
    return parser


def _port(text: str) -> int:
    port = int(text) if text.isascii() and text.isdecimal() else 0
    if not 0 < port < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: a whole number from 1 to 65535")
    return port


def say(line: str) -> None:
    """Tell the user, on stderr: stdout is for what can be evaluated."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def up(options: argparse.Namespace) -> None:
    """Bring up what is not up, create the resources, print how to use them."""
    state = _wanted(options)
    if state.mode == "containers":
        _containers_up(state)
    else:
        _processes_up(state)
    aws, pubsub = f"http://{HOST}:{state.aws_port}", f"{HOST}:{state.pubsub_port}"
    asyncio.run(seed.seed_aws(aws))
    seed.seed_pubsub(pubsub)
    environment = {**resources.aws_environment(aws), **resources.pubsub_environment(pubsub)}
    exports = "".join(f"export {name}={value}\n" for name, value in environment.items())
    (folder() / "env").write_text(exports)
    _tell(state, exports, only_exports=options.env)


def _wanted(options: argparse.Namespace) -> State:
    """What is to be up: what is up already, if that is what is asked for; else what is asked for, else the defaults."""
    asked = {"mode": options.mode, "aws_port": options.aws_port, "pubsub_port": options.pubsub_port}
    state = State.load()
    if state is not None and _is_up(state):
        for name, value in asked.items():
            if value not in {None, getattr(state, name)}:
                up, wanted = _option(name, getattr(state, name)), _option(name, value)
                raise CloudError(f"it is up with {up}, not {wanted}: localstack/down first")
        return state
    missing = containers.missing() if options.mode != "processes" else None
    if missing and options.mode == "containers":
        raise CloudError(f"no containers can be started: {missing}")
    if missing:
        say(f"without containers: {missing}")
    return State(
        mode=options.mode or ("processes" if missing else "containers"),
        aws_port=options.aws_port or AWS_PORT,
        pubsub_port=options.pubsub_port or PUBSUB_PORT,
    )


def _option(name: str, value: object) -> str:
    """How the value is asked for on the command line."""
    return f"--{value}" if name == "mode" else f"--{name.replace('_', '-')} {value}"


def _is_up(state: State) -> bool:
    """Whether any part of it runs."""
    if state.mode == "containers":
        return containers.running()
    return any(alive(*group) for group in state.groups.values())


def _processes_up(state: State) -> None:
    """Start what does not run, and wait for all; what was started is stopped again if it does not get ready."""
    services = (localstack(state.aws_port, folder()), pubsub(state.pubsub_port))
    lacking = [each for each in services if each.name not in state.groups or not alive(*state.groups[each.name])]
    for service in lacking:
        refuse_taken(service.port, service.name, service.option)
    started: list[Running] = []
    try:
        for service in lacking:
            say(f"starting {service.name} on {HOST}:{service.port}")
            started.append(start(service, folder(), tied=False))
            state.groups[service.name] = (started[-1].process.pid, service.marker)
            state.save()
        for running in started:
            running.until_ready()
        # An earlier `up` that was killed may have left what is not ready yet.
        for service in services:
            gone = partial(_exit_code, *state.groups[service.name])
            until_ready(service.name, service.ready, service.port, folder() / service.log_name, gone)
    except BaseException:
        for running in started:
            running.stop()
        raise


def _exit_code(group: int, marker: str) -> int | None:
    """None while the group lives. How another process's child ended cannot be known: -1 then."""
    return None if alive(group, marker) else -1


def _containers_up(state: State) -> None:
    if not containers.running():
        refuse_taken(state.aws_port, "LocalStack", "--aws-port")
        refuse_taken(state.pubsub_port, "Pub/Sub emulator", "--pubsub-port")
    say("starting the containers (the first time, their images are pulled: about 2 GB)")
    state.save()
    containers.up(state.aws_port, state.pubsub_port)
    # Healthy inside; now also from here.
    until_ready("LocalStack", localstack_ready, state.aws_port, None, lambda: None)
    until_ready("Pub/Sub emulator", pubsub_ready, state.pubsub_port, None, lambda: None)


def _tell(state: State, exports: str, *, only_exports: bool) -> None:
    """Print the exports, and for people the URLs too."""
    if only_exports:
        sys.stdout.write(exports)
        return
    width = max(len(what) for what, _ in resources.URLS)
    urls = "".join(f"  {what:{width}}  {url}\n" for what, url in resources.URLS)
    sys.stdout.write(
        f"The local cloud is up ({state.mode}), its logs and state are in {folder()}.\n\n"
        f"{exports}\nTo set these in a shell: . {shlex.quote(str(folder() / 'env'))}\n\n{urls}"
    )


def down() -> None:
    """Take down what is up, and remove what it held; the logs stay."""
    state = State.load()
    if state is None or not _is_up(state):
        say("the local cloud is not up")
    elif state.mode == "containers":
        containers.down()
        say("the local cloud is down")
    else:
        for group, marker in state.groups.values():
            if alive(group, marker):
                stop_group(group)
        say("the local cloud is down")
    State.remove()
    (folder() / "env").unlink(missing_ok=True)
    for name in ("files", "tmp"):
        shutil.rmtree(folder() / name, ignore_errors=True)
