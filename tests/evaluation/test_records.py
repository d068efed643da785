"""The file of records: going on, torn lines, other evaluations, other files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vkvx.errors import InputError, StorageError
from vkvx.evaluation.records import Record, Records

PRINT = {"target": "x", "settings": {"1 bit": {"bits": 1}}}
RECORD = Record(
    sample=0,
    setting="1 bit",
    text="é",
    tokens=[1, 2],
    answers=["a"],
    equal=True,
    hits=2,
    count=2,
    kl=0.1,
    attention=[[[0.1, 2.0]]],
    visual_bytes=8,
    elements=64,
    seconds=0.5,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.jsonl"


def fill(path: Path, count: int = 3) -> None:
    with Records(path, PRINT) as records:
        records.add(replace(RECORD, sample=i) for i in range(count))


def test_records_come_back(path: Path) -> None:
    fill(path)
    with Records(path, PRINT) as records:
        assert records.of("1 bit", 3) == [replace(RECORD, sample=i) for i in range(3)]
        assert records.get(3, "1 bit") is None
        records.add([replace(RECORD, sample=1, text="again"), replace(RECORD, sample=3)])
        assert records.of("1 bit", 4)[1].text == "é"
    assert len(path.read_text().splitlines()) == 5


@pytest.mark.parametrize("kept", [1, 20, -2, -1])
def test_a_torn_line_is_dropped(path: Path, kept: int) -> None:
    """Also one that lacks nothing but the line's end."""
    fill(path)
    *whole, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole) + last[:kept])
    with Records(path, PRINT) as records:
        assert len(records) == 2
        records.add([replace(RECORD, sample=2)])
    assert path.read_bytes() == b"".join([*whole, last])


def test_a_torn_header_is_begun_anew(path: Path) -> None:
    fill(path)
    path.write_bytes(path.read_bytes()[:40])
    fill(path, 1)
    with Records(path, PRINT) as records:
        assert len(records) == 1


def test_another_evaluation(path: Path) -> None:
    fill(path)
    before = path.read_bytes()
    with pytest.raises(StorageError, match=r'its target: "x", now "y"\).*--force'):
        Records(path, {**PRINT, "target": "y"})
    assert path.read_bytes() == before
    with Records(path, {**PRINT, "target": "y"}, force=True) as records:
        assert len(records) == 0
        assert path.read_bytes() == before  # until there is something in its place
        records.add([RECORD])
    header, record = map(json.loads, path.read_text().splitlines())
    assert (header["fingerprint"]["target"], record["text"]) == ("y", RECORD.text)


def test_the_same_evaluation_goes_on_with_force(path: Path) -> None:
    fill(path)
    with Records(path, PRINT, force=True) as records:
        assert len(records) == 3


def test_nothing_is_written_before_the_first_record(path: Path) -> None:
    with Records(path, PRINT):
        pass
    assert not path.exists()


@pytest.mark.parametrize("content", ["hello\n", '{"format": "other"}\n', "[]", "\x00" * 10])
def test_another_file_is_never_touched(path: Path, content: str) -> None:
    path.write_text(content)
    for force in (False, True):
        with pytest.raises(StorageError, match="holds no records"):
            Records(path, PRINT, force=force)
    assert path.read_text() == content


def test_a_damaged_line_in_the_middle(path: Path) -> None:
    fill(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"{}\n", *lines[3:]]))
    with pytest.raises(InputError, match=r"records\.jsonl:3 is no record"):
        Records(path, PRINT)
    with Records(path, PRINT, force=True) as records:
        assert len(records) == 0


def test_without_a_file() -> None:
    with Records(None, PRINT) as records:
        records.add([RECORD])
        assert records.get(0, "1 bit") == RECORD
