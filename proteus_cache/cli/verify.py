"""`proteus-cache verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proteus_cache.cli import complete, terminal

if TYPE_CHECKING:
    from proteus_cache.cache.verify import Finding
    from proteus_cache.stores import Kind


@terminal.command("verify changes nothing; to repeat it", go_on=())
def verify_command(
    path: Annotated[
        Path,
        typer.Argument(help="A cache, pack or run.", autocompletion=complete.stores("cache", "pack", "run")),
    ],
    read_data: Annotated[
        bool, typer.Option("--read-data", help="Read everything and check every digest and checksum.")
    ] = False,
    as_json: terminal.Json = False,
    quiet: terminal.Quiet = False,
) -> None:
    """Check structure and sizes, or with --read-data every byte. Ends with 1 when something is wrong.

    Example: proteus-cache verify proteus/caches/dinov2_vitg14 --read-data
    """
    from proteus_cache.report.summary import kind_of

    kind = kind_of(path)
    with terminal.progress("verify", "files" if kind == "run" else "units") as update:
        findings = _verify(kind, path, read_data, update)
    depth = "every digest and checksum" if read_data else "structure and sizes"
    lines = [f"{finding.path}: {finding.problem}\n    {finding.remedy}" for finding in findings]
    count = f"{len(findings):,} finding{'s' * (len(findings) != 1)}"
    lines.append(f"{kind} {path}: {count if findings else f'whole; checked {depth}'}")
    outcome = {
        "path": str(path),
        "kind": kind,
        "read_data": read_data,
        "is_whole": not findings,
        "findings": [asdict(finding) for finding in findings],
    }
    terminal.result(as_json, outcome, lines, None if read_data or findings else _deeper(path))
    if findings:
        raise typer.Exit(1)


def _deeper(path: Path) -> str:
    from proteus_cache.next_steps import command_line

    return command_line("verify", path, "--read-data")


def _verify(kind: Kind, path: Path, read_data: bool, update: terminal.Update) -> list[Finding]:
    if kind == "cache":
        from proteus_cache.cache.verify import verify_cache

        return verify_cache(path, read_data, update)
    if kind == "pack":
        from proteus_cache.pack.verify import verify_pack

        return verify_pack(path, read_data, update)
    from proteus_cache.train.verify import verify_run

    return verify_run(path, read_data, update)
