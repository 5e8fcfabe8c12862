import pytest

from proteus_cache.plan import human_bytes, human_rate, human_time


@pytest.mark.parametrize(
    ("count", "text"),
    [(512, "512 B"), (37_620, "37.6 KB"), (394_752, "395 KB"), (999_600, "1 MB"), (2.23e12, "2.23 TB")],
)
def test_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (45, "45 s"),
        (2760, "46 min"),
        (12_240, "3.4 h"),
        (359_000, "99.7 h"),
        (4_330_800, "1,203 h"),
        (5.135e10, "1,627 y"),
    ],
)
def test_times(seconds: float, text: str) -> None:
    assert human_time(seconds) == text


@pytest.mark.parametrize(("per_s", "text"), [(0.2134, "0.213"), (24.21, "24.2"), (1270.4, "1,270")])
def test_rates(per_s: float, text: str) -> None:
    assert human_rate(per_s) == text
