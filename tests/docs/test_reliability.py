"""The counts in docs/reliability.md are those of the tests."""

import re
from pathlib import Path

import pytest

from tests.extract import test_input_trouble
from tests.reliability import (
    seeded_bugs,
    test_crash_points,
    test_full_disk,
    test_integrity,
    test_kills,
    test_machine,
    test_pipeline_bugs,
    test_power_loss,
    test_races,
    test_same_bytes,
)
from tests.repair import test_killed
from tests.safety import test_documents, test_fuzz, test_tars, test_urls, test_zarr_units
from tests.views import test_corpus

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
KILLS = test_kills.N_KILLS
RACES = (
    *(test_races.N_RACES_OF_TWO, test_races.N_RACES_OF_FOUR, test_races.N_RACES_WITHOUT_LOCKS),
    *(test_races.N_RACES_ON_OLD_NEWS, test_races.N_RACES_OF_PROCESSES, test_races.N_RACES_OF_PACKERS),
)
COUNTS = {
    "R1": (sum(test_crash_points.LEAST_POINTS.values()), sum(test_crash_points.LEAST_KILLS.values())),
    "R2": (test_crash_points.N_DOUBLE_CRASHES,),
    "R3": (sum(KILLS.values()), *KILLS.values()),
    "R6": (test_power_loss.MOST_STATES,),
    "R7": (test_full_disk.N_SIZES, test_full_disk.N_INODE_LIMITS, len(test_full_disk.COMMAND_SIZES)),
    "R8": RACES,
    "I1": (test_integrity.N_FLIPS, test_integrity.N_FLIPS // test_integrity.N_FLIPS_PER_KIND),
    "I2": (test_integrity.N_CACHE_CASES, test_integrity.N_PACK_CASES, test_integrity.N_RUN_CASES),
    "I3": (test_pipeline_bugs.N_BUGS,),
    "I4": (test_same_bytes.N_VARIANTS,),
    "I5": (test_killed.CACHE_POINTS, test_killed.PACK_POINTS),
    "S1 to S6": (test_tars.N_TARS, test_zarr_units.N_UNITS, test_documents.N_DOCUMENTS, test_urls.N_CASES),
    "B1, B2": (test_corpus.N_FILES, test_input_trouble.N_CASES),
    "F1, F2": (test_fuzz.N_DOCUMENTS, test_fuzz.N_TARS),
    "F3": (test_machine.N_RUNS, test_machine.N_STEPS),
}


@pytest.mark.parametrize("row", COUNTS)
def test_the_page_states_the_counts_of_the_tests(row: str) -> None:
    line = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {row} |"))
    stated = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", line.split("|")[2])]

    assert set(COUNTS[row]) <= set(stated), f"{row}: {COUNTS[row]} in the tests, {stated} on the page"


def test_the_page_names_only_tests_that_exist() -> None:
    named = re.findall(r"`(tests/[a-z0-9_/]+(?:\.py)?)`", PAGE.read_text())

    assert len(named) >= 15
    assert all(Path(PAGE.parents[1], name).exists() for name in named)


def test_the_page_says_how_many_bugs_are_put_in() -> None:
    assert len(seeded_bugs.BUGS) == 12
    assert "twelve classic bugs" in PAGE.read_text()
