"""`proteus-cache verify`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from proteus_cache.cli import terminal


@terminal.command("verify changes nothing: run it again")
def verify_command(
    path: Annotated[Path, typer.Argument(help="A cache, pack or run.")],
    read_data: Annotated[
        bool, typer.Option("--read-data", help="Read everything and check every digest and checksum.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check structure and sizes, or with --read-data every byte. Ends with 1 when something is wrong.

    Example: proteus-cache verify proteus/caches/dinov2_vitg14 --read-data
    """
    from proteus_cache.report.summary import kind_of

    kind = kind_of(path)
    with terminal.progress("verify", "units") as update:
        findings = _verify(kind, path, read_data, lambda done, total: update(done, total, 0))
    depth = "every digest and checksum" if read_data else "structure and sizes (add --read-data to read everything)"
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
    terminal.result(as_json, outcome, lines)
    if findings:
        raise typer.Exit(1)


def _verify(kind: str, path: Path, read_data: bool, progress: Callable[[int, int], None]) -> list[Any]:
    if kind == "cache":
        from proteus_cache.cache.verify import verify_cache

        return verify_cache(path, read_data, progress)
    if kind == "pack":
        from proteus_cache.pack.verify import verify_pack

        return verify_pack(path, read_data, progress)
    from proteus_cache.train.verify import verify_run

    return verify_run(path, read_data)
