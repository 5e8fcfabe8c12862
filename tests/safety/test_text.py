"""What a store says is shown without escape codes, line breaks and controls of writing direction."""

from __future__ import annotations

import io
import json
import logging
import time
from pathlib import Path

import pytest

from proteus_cache.errors import FormatError
from proteus_cache.pack.reader import open_pack
from proteus_cache.text import printable
from tests.cli.running import run
from tests.safety.guarded import CASE_CPU_S
from tests.safety.stores import copied, reseal

_EVIL = "a\x1b[2J\x1b]0;t\x07\r\nid        spoofed\u202egnp.exe\u2028\x9b31m\x00\x7f"
"""Clears the screen, sets a title, begins a line, turns the writing round, ends a text."""


def _assert_plain(text: str) -> None:
    assert [char for char in text if char != "\n" and not char.isprintable()] == []
    assert not any(line.startswith("id        spoofed") for line in text.splitlines())


def test_everything_that_is_not_plainly_visible_is_escaped() -> None:
    shown = printable(_EVIL)

    assert shown.isprintable()
    assert printable(shown) == shown
    assert "\\x1b[2J" in shown
    assert "\\u202e" in shown
    assert printable("Grüße, 猫 and \u0416") == "Grüße, 猫 and \u0416"


def test_secrets_are_cut_and_words_are_not() -> None:
    assert printable("Authorization: Basic dXNlcjpwYXNzd29yZDE=") == "Authorization: Basic ***"
    assert printable("bearer eyJhbGciOiJIUzI1NiJ9.x") == "bearer ***"
    assert printable("https://me:word@host/x?key=1") == "https://***@host/x?***"
    for words in ("a basic transformer model", "runs/basic vit_small_patch14", "Bearer of bad news"):
        assert printable(words) == words


def test_info_and_verify_show_what_a_pack_says_plainly(honest_pack: Path, tmp_path: Path) -> None:
    root = copied(honest_pack, tmp_path / "pack")

    def change(document: dict[str, object]) -> None:
        teacher = document["teacher"]
        assert isinstance(teacher, dict)
        teacher.update(name=_EVIL, weights_source=_EVIL, implementation=_EVIL, licence=_EVIL)
        document.update(classes=[_EVIL], licences={_EVIL: _EVIL})

    reseal(root / "pack.json", change)
    (root / (_EVIL.replace("\x00", "") + ".pkl")).write_bytes(b"x")

    told = [run("info", root), run("verify", root, code=1), run("verify", root, "--read-data", code=1)]
    as_json = [run("info", root, "--json"), run("verify", root, "--json", code=1)]

    for outcome in [*told, *as_json]:
        _assert_plain(outcome.stdout)
        _assert_plain(outcome.stderr)
    assert json.loads(as_json[0].stdout)["teacher"]["name"] == _EVIL
    assert any("spoofed" in finding["path"] for finding in json.loads(as_json[1].stdout)["findings"])
    assert "spoofed" in told[1].stdout


def test_errors_and_logs_are_plain(honest_pack: Path, tmp_path: Path) -> None:
    name = _EVIL.replace("\x00", "").replace("/", "")
    root = copied(honest_pack, tmp_path / name)
    (root / "v000.idx").write_bytes(b"")
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)

    with pytest.raises(Exception, match="spoofed") as raised:
        open_pack(root).check_index("v000")
    logger = logging.getLogger("proteus_cache.tests")
    logger.addHandler(handler)
    logger.warning("skipped reason=%s", raised.value)
    logger.removeHandler(handler)

    _assert_plain(str(raised.value))
    _assert_plain(stream.getvalue())
    assert stream.getvalue().count("\n") == 1
    for arguments in (("info", tmp_path / "none" / name), ("train", "--student", name), ("verify", root)):
        outcome = run(*arguments, code=2 if arguments[0] != "verify" else 1)
        _assert_plain(outcome.output)


def test_an_error_is_plain_however_it_is_shown() -> None:
    error = FormatError(f"{_EVIL}: is damaged")

    assert str(error).isprintable()
    assert f"{error}" == str(error)


@pytest.mark.parametrize(
    "part", ["a", "a.", "a:/", "a://", "a:///x@", "a:/?", "a:/x?y ", ")a:/?", "hf_", "Bearer a", "basic A1"]
)
def test_a_long_text_costs_no_more_than_its_length(part: str) -> None:
    text = part * ((1 << 19) // len(part))
    began = time.process_time()

    printable(text)

    assert time.process_time() - began < CASE_CPU_S
