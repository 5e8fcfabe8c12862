"""Running a pipeline: what is finished is skipped, the rest runs as commands, one after the other.

Each stage is a process of its own, and the command in it is the one that `--dry-run` shows. So there is one way
to do a thing and one rule for going on with it: the command's. It starts a process for each GPU by itself, its memory
and its GPUs are free again when it ends, and a student trained here has the bytes of one that was trained by hand.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from proteus_cache import storage
from proteus_cache.demo.scenes import write_scenes
from proteus_cache.errors import ProteusCacheError, UsageError
from proteus_cache.pipeline.document import Draw
from proteus_cache.pipeline.finished import is_finished
from proteus_cache.pipeline.stages import Stage, to_json
from proteus_cache.processes import worker_from_environment

_PATIENCE_S = 630.0
"""For a stage that is stopped: several processes train up to `log_every` steps on and then write a checkpoint."""


class Show(Protocol):
    """Where a pipeline tells what it does."""

    def say(self, line: str) -> None:
        """One line."""

    def progress(self, label: str, unit: str) -> AbstractContextManager[Callable[[float, float, int], None]]:
        """A bar that takes (done, all, bytes so far)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """How a stage went."""

    stage: Stage
    is_skipped: bool
    """Whether it was finished before."""
    seconds: float
    result: dict[str, Any] | None
    """What its command printed with `--json`, or the report that was there; None where nothing ran."""

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        status = "was finished" if self.is_skipped else "done"
        return to_json(self.stage) | {"status": status, "seconds": self.seconds, "result": self.result}


def run_pipeline(stages: Sequence[Stage], program: Sequence[str], flags: Sequence[str], show: Show) -> list[Done]:
    """Bring every stage to its end, in order.

    Args:
        stages: as `stages_of` gives them.
        program: what takes the arguments of `proteus-cache`; it must not outlive this process.
        flags: added to every command.
        show: told what goes on.

    Raises:
        UsageError: several processes of one launcher, files that are not there, or a stage that was made with other
            settings.
        ProteusCacheError: a stage failed; it has said why.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the stage was stopped and keeps what it has.
    """
    _refuse_launcher()
    finished = {stage.title: is_finished(stage, list(stages)) for stage in stages}
    _check_inputs([stage for stage in stages if not finished[stage.title]])
    done = []
    for number, stage in enumerate(stages, 1):
        place = f"[{number}/{len(stages)}]"
        # Asked again: an earlier stage may have changed what this one is made of.
        if finished[stage.title] and is_finished(stage, list(stages)):
            show.say(f"{place} {stage.title}: finished, {stage.out}")
            done.append(Done(stage=stage, is_skipped=True, seconds=0.0, result=_report(stage)))
            continue
        show.say(f"{place} {stage.title}")
        began = time.monotonic()
        result = _drawn(stage, show) if stage.kind == "draw" else _commanded(stage, program, flags, show)
        seconds = round(time.monotonic() - began, 2)
        done.append(Done(stage=stage, is_skipped=False, seconds=seconds, result=result))
    return done


def _refuse_launcher() -> None:
    worker = worker_from_environment()
    if worker is not None and worker.count > 1:
        raise UsageError(
            f"this is process {worker.index + 1} of {worker.count} of a launcher, and a pipeline starts its processes "
            "itself: run it once, outside of torchrun, srun and SLURM arrays; pipelines/launch/ has files for those"
        )


def _check_inputs(stages: Sequence[Stage]) -> None:
    """Refuse before hours have gone what the last stage would refuse."""
    for stage in stages:
        for path in stage.inputs:
            if not path.exists():
                raise UsageError(f"{path}: no such file or folder; {stage.title} needs it")


def _report(stage: Stage) -> dict[str, Any] | None:
    """The report of a finished evaluation."""
    if stage.kind != "eval":
        return None
    report = json.loads(storage.read_bytes(stage.out, 64 << 20))
    return report if isinstance(report, dict) else None


def _drawn(stage: Stage, show: Show) -> dict[str, Any]:
    assert isinstance(stage.section, Draw)
    with show.progress("draw", "images") as update:
        n_images = write_scenes(
            stage.out,
            per_class=stage.section.per_class,
            seed=stage.section.seed,
            progress=lambda done, total: update(done, total, 0),
        )
    return {"images": n_images}


def _commanded(stage: Stage, program: Sequence[str], flags: Sequence[str], show: Show) -> dict[str, Any]:
    """Run a stage's command; returns what it printed."""
    if stage.config is not None:
        path, text = stage.config
        storage.make_folder(path.parent)
        storage.write_whole(path, text.encode)
    show.say(f"$ {stage.command}")
    status, printed = _run([*program, *stage.arguments, "--json", *flags])
    result = _parsed(printed)
    if status != 0:
        raise _failure(stage, status)
    if stage.kind == "eval":
        _save(stage, result)
    return result


def _parsed(printed: str) -> dict[str, Any]:
    try:
        value = json.loads(printed)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _save(stage: Stage, report: dict[str, Any]) -> None:
    """Keep a report, with the command that it is the answer to."""
    text = json.dumps(report | {"command": stage.command}, indent=1, sort_keys=True, allow_nan=False) + "\n"
    storage.write_whole(stage.out, text.encode)


def _failure(stage: Stage, status: int) -> ProteusCacheError:
    how = f"was killed by signal {-status}" if status < 0 else "failed, and has said why above"
    kind = UsageError if status == 2 else ProteusCacheError
    return kind(f"{stage.title} {how}; what is finished is kept, and the same command goes on from there")


def _run(arguments: Sequence[str]) -> tuple[int, str]:
    """Run a command to its end; returns its status and its standard output.

    It gets a process group of its own, so that Ctrl-C reaches it once: through this process, which waits for it.

    Raises:
        KeyboardInterrupt: SIGINT or SIGTERM came; the command has ended.
    """
    with subprocess.Popen(
        arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, process_group=0
    ) as process:
        try:
            printed, _ = process.communicate()
        except KeyboardInterrupt:
            _stop(process)
            raise
        except BaseException:
            _kill(process)
            raise
    return process.returncode, printed


def _stop(process: subprocess.Popen[str]) -> None:
    """Ask a command to end, and wait; a second Ctrl-C ends it at once."""
    process.terminate()
    try:
        process.communicate(timeout=_PATIENCE_S)
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def lines_of(done: Sequence[Done]) -> list[str]:
    """What a pipeline did, for people."""
    n_skipped = sum(one.is_skipped for one in done)
    lines = [_line(one) for one in done]
    if n_skipped == len(done):
        return [*lines, f"nothing to do: all {n_skipped} stages were finished"]
    seconds = sum(one.seconds for one in done)
    counts = [f"{len(done) - n_skipped} done in {_time(seconds)}"]
    if n_skipped:
        counts.append(f"{n_skipped} finished before")
    return [*lines, f"stages    {len(done)}: {', '.join(counts)}"]


def _line(one: Done) -> str:
    state = "was finished" if one.is_skipped else _time(one.seconds)
    scores = _scores(one.result) if one.stage.kind == "eval" and one.result is not None else ""
    return f"{one.stage.kind:<9} {one.stage.out}: {state}{scores}"


def _scores(report: dict[str, Any]) -> str:
    """The best top-1 of each model of a report, in percent: of its numbers of neighbours, or of its linear heads."""
    found = []
    for model in report.get("models", []):
        shares = [score["top1"] for score in model.get("scores", []) if score.get("top1") is not None]
        if shares:
            found.append(f"{model['model']} {100 * max(shares):.1f} %")
    best = {"knn": "best k", "linear": "best head"}.get(report["protocol"], "best")
    return f"; {report['protocol']}, {best}: {', '.join(found)}" if found else ""


def _time(seconds: float) -> str:
    from proteus_cache.plan.human import human_time

    return human_time(seconds)
