"""The command `proteus-cache`: its sub-commands in the order of a user's work."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from proteus_cache import __version__
from proteus_cache.choices import either, nearest, unknown
from proteus_cache.cli import forget_interruption, terminal
from proteus_cache.cli.demo import demo_command
from proteus_cache.cli.evaluate import evaluate_command
from proteus_cache.cli.extract import extract_command
from proteus_cache.cli.fetch import fetch_command
from proteus_cache.cli.fidelity import fidelity_command
from proteus_cache.cli.info import info_command
from proteus_cache.cli.pack import pack_command
from proteus_cache.cli.pipeline import pipeline_command
from proteus_cache.cli.plan import plan_command
from proteus_cache.cli.repair import repair_command
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
        given = list(sys.argv[1:] if args is None else args)
        try:
            with terminal.started_with(given):
                status = super().main(given, prog_name, complete_var, False, windows_expand_args, **extra)
        except Exception as error:
            if not hasattr(error, "format_message"):  # typer has no public name for errors of its parser
                raise
            sys.exit(_report(error, given, list(self.commands)))
        if status == terminal.INTERRUPTED:  # while typer parsed: a command has its own last words
            forget_interruption()
            if not terminal.is_stage():
                terminal.complain("interrupted; nothing was begun")
        sys.exit(1 if status == terminal.INTERRUPTED else status or 0)


def _report(error: Any, given: list[str], commands: list[str]) -> int:
    """Print an error of typer's parser; returns the exit code."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # its message is the help
    else:
        where = " ".join(["proteus-cache", *(word for word in given[:1] if word in commands)])
        reason = _reason(error, given, commands)
        terminal.complain(f"{reason}{' See' if reason.endswith('?') else '; see'} {where} --help")
    return int(error.exit_code)


def _reason(error: Any, given: list[str], commands: list[str]) -> str:
    """What is wrong with a command line, in our words where typer's are those of a program."""
    if (option := getattr(error, "option_name", None)) is not None and hasattr(error, "possibilities"):
        near = [f"--{name}" for name in nearest(option.lstrip("-"), _long_options(error))]
        return f"no such option {option}" + (f"; did you mean {either(near)}?" if near else "")
    message = str(error.format_message()).rstrip(".")
    if message.startswith("No such command"):
        name = next((word for word in given if not word.startswith("-")), "")
        return unknown("command", name, commands)
    wrong = re.fullmatch(r"Invalid value for '?([^':]+)'?: Input should be a valid (\w+).*", message, re.DOTALL)
    if wrong is not None:
        kind = {"integer": "whole number"}.get(wrong[2], wrong[2])
        return f"{wrong[1]} takes a {kind}{_what_was_given(wrong[1], given)}"
    return message[:1].lower() + message[1:]


def _long_options(error: Any) -> list[str]:
    """Options of the command that an error of typer's parser is about, without their dashes."""
    context = getattr(error, "ctx", None)
    parameters = context.command.params if context is not None else []
    return [name[2:] for parameter in parameters for name in parameter.opts if name.startswith("--")]


def _what_was_given(option: str, given: list[str]) -> str:
    """The value of an option on a command line, for a message."""
    for word, after in zip(given, [*given[1:], ""], strict=True):
        if word == option:
            return f", got {after!r}"
        if word.startswith(f"{option}="):
            return f", got {word.partition('=')[2]!r}"
    return ""


app = typer.Typer(
    cls=_Commands,
    name="proteus-cache",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run a vision foundation model once over augmented views, keep what it said, and distil any number of "
    "students from that.",
)
app.command("demo")(demo_command)
app.command("plan")(plan_command)
app.command("extract")(extract_command)
app.command("pack")(pack_command)
app.command("train")(train_command)
app.command("eval")(evaluate_command)
app.command("pipeline")(pipeline_command)
app.command("info")(info_command)
app.command("verify")(verify_command)
app.command("repair")(repair_command)
app.command("fidelity")(fidelity_command)
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
