"""The command `proteus-cache`: its sub-commands in the order of a user's work."""

from __future__ import annotations

import typer

from proteus_cache import __version__
from proteus_cache.cli.evaluate import evaluate_command
from proteus_cache.cli.extract import extract_command
from proteus_cache.cli.fetch import fetch_command
from proteus_cache.cli.info import info_command
from proteus_cache.cli.pack import pack_command
from proteus_cache.cli.train import train_command
from proteus_cache.cli.verify import verify_command

app = typer.Typer(
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
