"""The command `proteus-cache`: its sub-commands in the order of a user's work."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from proteus_cache import __version__
from proteus_cache.cli import terminal
from proteus_cache.cli.evaluate import evaluate_command
from proteus_cache.cli.extract import extract_command
from proteus_cache.cli.fetch import fetch_command
from proteus_cache.cli.info import info_command
from proteus_cache.cli.pack import pack_command
from proteus_cache.cli.train import train_command
from proteus_cache.cli.verify import verify_command


class _Commands(TyperGroup):
    """The sub-commands; a misspelt option or a missing value is one line too, with exit code 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        try:
            status = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except Exception as error:
            if not hasattr(error, "format_message"):  # typer has no public name for errors of its parser
                raise
            sys.exit(_report(error))
        sys.exit(status or 0)


def _report(error: Any) -> int:
    """Print an error of typer's parser; returns the exit code."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # its message is the help
    else:
        message = error.format_message().rstrip(".")
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "proteus-cache"
        terminal.complain(f"{message[:1].lower()}{message[1:]}; see {where} --help")
    return int(error.exit_code)


app = typer.Typer(
    cls=_Commands,
    name="proteus-cache",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run a vision foundation model once over augmented views, keep what it said, and distil any number of "
    "students from that.",
)
app.command("extract")(extract_command)
app.command("pack")(pack_command)
app.command("train")(train_command)
app.command("eval")(evaluate_command)
app.command("info")(info_command)
app.command("verify")(verify_command)
app.command("fetch")(fetch_command)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"proteus-cache {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
    ),
) -> None:
    """Takes the options before the sub-command."""


def main() -> None:
    """Run the command line; never returns."""
    app(prog_name="proteus-cache")
