"""The examples as their headers say: those commands, in a folder of their own."""

import ast
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from string import Template
from typing import Any

from command import plain, rejoinder
from worker_process import LoggingProcess

EXAMPLES = Path(__file__).parents[2] / "examples"
REQUESTS = "sqlite:///work.db?queue=requests"
RESPONSES = "sqlite:///work.db?queue=responses"
NOT_HERE = ("eval ", "aws ", "MODEL=")
"""Commands whose part the test takes: the local cloud is a fixture, and nothing comes from a hub."""


class Example:
    """One example.

    Args:
        name: Of its file.
        folder: Where its commands run, in which `examples` is.
        variables: What its commands take from the shell.
    """

    def __init__(self, name: str, folder: Path, **variables: str) -> None:
        self.name, self.folder, self.variables = name, folder, variables
        (folder / "examples").mkdir()
        for file in EXAMPLES.iterdir():
            if file.is_file():
                (folder / "examples" / file.name).symlink_to(file)
        header = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text())) or ""
        lines = [line[4:] for line in header.splitlines() if line.startswith("    ")]
        commands = "\n".join(lines).replace("\\\n", " ").splitlines()
        commands = [command for command in commands if not command.startswith(NOT_HERE)]
        at = next(place for place, command in enumerate(commands) if command.endswith("&"))
        self._before, self._worker, self.after = commands[:at], commands[at], commands[at + 1 :]

    def worker(self, *arguments: str) -> LoggingProcess:
        """Run the commands before the worker, and start it, with further arguments."""
        for command in self._before:
            self.shell(command)
        words = [Template(word).substitute(self.variables) for word in shlex.split(self._worker)[:-1]]
        assert words[:2] == ["rejoinder", "worker"]
        log = ("--log-format", "json", *arguments)
        rest = ["-m", "rejoinder.cli.main", *words[1:], *log]
        return LoggingProcess(rest, self.folder / "log", cwd=self.folder)

    def asked(self, *, on: str = "id") -> dict[Any, dict[str, Any]]:
        """Run the commands after the worker, the last of which is a join: each request's response, by its metadata."""
        *others, join = self.after
        for command in others:
            self.shell(command)
        return _by(on, self.shell(join))

    def answers(self, *requests: dict[str, Any], on: str = "id") -> dict[Any, dict[str, Any]]:
        """Publish other requests and join their responses."""
        return self.joined(self.publish(*requests), on=on)

    def publish(self, *requests: dict[str, Any]) -> Path:
        file = self.folder / "others.jsonl"
        file.write_text("".join(json.dumps(request) + "\n" for request in requests))
        done = rejoinder("publish", "--requests", REQUESTS, file, cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return file

    def joined(self, file: Path, *, on: str = "id") -> dict[Any, dict[str, Any]]:
        done = rejoinder("join", file, RESPONSES, "--timeout", "60", cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return _by(on, done.stdout)

    def shell(self, command: str) -> bytes:
        """Run one command as a user with this environment does, and give what it prints."""
        environment = plain() | self.variables
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=environment, capture_output=True, timeout=120, check=False
        )
        assert done.returncode == 0, (command, done.stderr, (self.folder / "log").read_text()[-3000:])
        return done.stdout


def _by(key: str, joined: bytes) -> dict[Any, dict[str, Any]]:
    pairs = [json.loads(line) for line in joined.splitlines()]
    return {pair["request"]["metadata"][key]: pair["response"] for pair in pairs}
