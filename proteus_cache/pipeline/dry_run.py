"""A pipeline checked as far as it can be without images, weights and a GPU, and told in commands and numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proteus_cache import storage
from proteus_cache.next_steps import command_line
from proteus_cache.pipeline.document import read_pipeline
from proteus_cache.pipeline.numbers import Numbers, Reckoner, summary_lines
from proteus_cache.pipeline.stages import Stage, stages_of, to_json


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelinePlan:
    """What a file comes to."""

    file: Path
    stages: list[Stage]
    numbers: list[Numbers]
    """Of each stage."""
    free_bytes: float

    def lines(self) -> list[str]:
        """For people: each stage as a shell would run it, with its numbers as comments."""
        lines = [f"# {self.file}: {len(self.stages)} stages"]
        for number, (stage, known) in enumerate(zip(self.stages, self.numbers, strict=True), 1):
            lines += ["", f"# [{number}/{len(self.stages)}] {stage.title}"]
            lines += [f"#   {line}" for line in known.lines]
            lines += stage.shell
        next_line = f"to do it  {command_line('pipeline', self.file)}, or paste the lines above into a shell"
        together = summary_lines(self.numbers, self.free_bytes)
        return [*lines, "", *(f"# {line}" for line in together), f"# {next_line}"]

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        stages = [
            to_json(stage) | {"plan": known.values} for stage, known in zip(self.stages, self.numbers, strict=True)
        ]
        return {"pipeline": str(self.file), "stages": stages}


def plan_pipeline(file: Path, home: Path) -> PipelinePlan:
    """Read and check a pipeline.

    Args:
        file: its YAML.
        home: the folder PROTEUS_HOME.

    Raises:
        UsageError: something in the file is wrong; says where and what to write.
    """
    pipeline = read_pipeline(file)
    stages = stages_of(pipeline, home, file)
    reckoner = Reckoner(pipeline, stages, file)
    return PipelinePlan(
        file=file,
        stages=stages,
        numbers=[reckoner.of(stage) for stage in stages],
        free_bytes=storage.free_space(home.absolute()).bytes,
    )
