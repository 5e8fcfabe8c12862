"""Unknown names are answered with the nearest."""

from proteus_cache.choices import either, nearest, unknown

NAMES = ("float32", "float16", "int8")


def test_near_names_are_offered_likeliest_first() -> None:
    assert unknown("codec", "float61", NAMES) == "unknown codec 'float61'; did you mean float16 or float32?"


def test_without_a_near_name_all_are_listed() -> None:
    assert unknown("codec", "zip", NAMES, also="klt:RATE") == (
        "unknown codec 'zip'; choose float32, float16, int8 or klt:RATE"
    )


def test_capitals_and_dashes_make_no_other_name() -> None:
    assert nearest("DINOv2-ViTS14", ["dinov2_vits14", "dinov2_vitb14"]) == ["dinov2_vits14"]


def test_a_choice_reads_as_one() -> None:
    assert (either([]), either(["a"]), either(["a", "b"]), either(["a", "b", "c"])) == ("", "a", "a or b", "a, b or c")
