"""The entry point. A command's module is imported when the command runs: `--help` shows them all and imports none."""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rejoinder.cli.errors import ExitCode, failure_of

# name -> (where its function is, one line of help), in the order of `--help`
COMMANDS = {
    "demo": ("rejoinder.cli.demo:demo", "Show it all working here: queues, the real model, joined answers."),
    "worker": ("rejoinder.cli.worker:worker", "Pull requests, run the model, publish responses."),
    "publish": ("rejoinder.cli.publish:publish", "Send JSON lines of requests; print their message ids."),
    "consume": ("rejoinder.cli.consume:consume", "Receive responses; print them as JSON lines."),
    "cancel": ("rejoinder.cli.cancel:cancel", "Ask the workers to end requests: answered 499, not run further."),
    "join": ("rejoinder.cli.join:join", "Put each response to its request, by the metadata it carries."),
    "doctor": (
        "rejoinder.cli.doctor:doctor",
        "Check the queues, and say what to do.",
    ),
    "config": ("rejoinder.cli.config:config", "Show each setting, its value and where it comes from."),
    "schema": ("rejoinder.cli.schema:schema", "Print the JSON Schema of a request, a response or a body."),
    "version": ("rejoinder.cli.version:version", "Print the version."),
}


class LazyGroup(TyperGroup):
    """Lists the table's commands by their stubs, and puts the real one in place of a stub that is to run."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """As typer's own, with the command's module imported."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, (_load(name) if name in COMMANDS else command), rest

    def invoke(self, ctx: Any) -> Any:
        """As typer's own, with the errors that a user can cause as one line on stderr."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # Whoever read stdout has left (`| head`). The interpreter flushes stdout at its end: give it nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(ExitCode.FAILED) from None
        except Exception as exc:
            failure = failure_of(exc)
            if failure is None:
                raise
            typer.echo(f"rejoinder {ctx.invoked_subcommand}: {failure}", err=True)
            raise typer.Exit(failure.code) from exc


def _load(name: str) -> Any:
    module, _, function = COMMANDS[name][0].partition(":")
    # Typer's help is left plain: rich's costs 0.2 s of imports.
    single = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    single.command(name)(getattr(import_module(module), function))
    return typer.main.get_command(single)


def _stub() -> None:
    raise AssertionError("the real command runs instead")


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, (_, _help) in COMMANDS.items():
    app.command(_name, help=_help)(_stub)


def _show_version(value: bool) -> None:
    if value:
        from rejoinder.cli.version import version  # noqa: PLC0415  # its imports would slow everything else down

        version()
        raise typer.Exit


@app.callback()
def rejoinder(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run generative models behind queues; each response rejoins its request by the metadata it carries.

    Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 incomplete (some
    requests unanswered).
    """


def main() -> None:
    """Run the command line."""
    run: Callable[..., Any] = app
    run(prog_name="rejoinder")


if __name__ == "__main__":
    main()
