"""What was measured, one record a sample and setting, and the file that keeps them so that a run can go on.

The file is JSON Lines: a header that says what was evaluated, then records in the order in which they were made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from vkvx.errors import InputError, StorageError
from vkvx.storage import check_file

FORMAT, VERSION = "vkvx-eval-records", 1


@dataclass(frozen=True)
class Record:
    """One sample under one setting.

    ``tokens`` are those of the answer, the end token included; what compares with the reference is None where there is
    none: ``hits`` of ``count`` answer tokens of the reference are the likeliest here, too, ``kl`` is the sum of their
    divergences in nats. ``attention`` holds, by layer and query head, the squared norms of the error of the attention
    output and of the exact output. ``elements`` counts key and value elements of visual tokens, ``visual_bytes`` the
    bytes that they take; ``seconds`` is the sample's share of its batch.
    """

    sample: int
    setting: str
    text: str
    tokens: list[int]
    answers: list[str]
    equal: bool | None
    hits: int | None
    count: int | None
    kl: float | None
    attention: list[list[list[float]]] | None
    visual_bytes: float
    elements: int
    seconds: float
    histograms: list[dict[str, Any]] | None = None

    @property
    def key(self) -> tuple[int, str]:
        """Sample and setting."""
        return self.sample, self.setting


_NAMES = {entry.name for entry in fields(Record)}


class Records:
    """All records of a run, kept in a file if there is one. Use as a context manager."""

    def __init__(self, path: str | Path | None, fingerprint: Mapping[str, Any], *, force: bool = False) -> None:
        """Read the file. Raises StorageError if it holds anything else, or another evaluation, or cannot be written.

        With ``force`` another evaluation or a damaged file is replaced. A last line that is not whole is dropped.
        Nothing is written before the first record is.
        """
        self.path = None if path is None else Path(path)
        self._found: dict[tuple[int, str], Record] = {}
        self._file: IO[bytes] | None = None
        self._header = {"format": FORMAT, "version": VERSION, "fingerprint": dict(fingerprint)}
        self._end = 0
        if self.path is None:
            return
        check_file(self.path, "output= (--output)")
        if self.path.exists() and self.path.stat().st_size:
            self._end = self._read(force)

    def add(self, records: Iterable[Record]) -> None:
        """Keep records; they are in the file when this returns."""
        fresh = [record for record in records if record.key not in self._found]
        self._found |= {record.key: record for record in fresh}
        self._write([asdict(record) for record in fresh])

    def get(self, sample: int, setting: str) -> Record | None:
        """The record of a sample and setting, if it is there."""
        return self._found.get((sample, setting))

    def of(self, setting: str, count: int) -> list[Record]:
        """The records of a setting for the first ``count`` samples, in their order; all must be there."""
        return [self._found[sample, setting] for sample in range(count)]

    def __len__(self) -> int:
        return len(self._found)

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, entries: Sequence[Mapping[str, Any]]) -> None:
        if self.path is None or not entries:
            return
        if self._file is None:
            self._file = self.path.open("r+b" if self._end else "wb")
            self._file.truncate(self._end)
            self._file.seek(self._end)
            entries = entries if self._end else [self._header, *entries]
        for entry in entries:
            self._file.write(json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, force: bool) -> int:
        """Take over what the file holds; returns the bytes of its whole lines, 0 to begin anew."""
        assert self.path is not None
        content = self.path.read_bytes()
        lines = content.splitlines(keepends=True)
        first = _parse(lines[0])
        if not (isinstance(first, dict) and first.get("format") == FORMAT):
            # A header that was cut off is the beginning of the one that would be written now, or not ours.
            beginning = json.dumps({"format": FORMAT}, separators=(",", ":"))[:-1].encode()
            if len(lines) == 1 and not content.endswith(b"\n") and content.startswith(beginning):
                return 0
            raise StorageError(f"{self.path} holds no records of `vkvx eval`; choose another output= (--output)")
        if first != json.loads(json.dumps(self._header)):
            if force:
                return 0
            raise StorageError(
                f"{self.path} is of another evaluation ({_difference(first, self._header)}); "
                "choose another output= (--output), or start anew with force= (--force)"
            )
        end = len(lines[0])
        for number, line in enumerate(lines[1:], start=2):
            entry = _parse(line)
            if not line.endswith(b"\n") and number == len(lines):
                break
            if not isinstance(entry, dict) or set(entry) != _NAMES:
                if force:
                    self._found.clear()
                    return 0
                raise InputError(f"{self.path}:{number} is no record; start anew with force= (--force)")
            record = Record(**entry)
            self._found[record.key] = record
            end += len(line)
        return end


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    if found.get("version") != wanted["version"]:
        return f"version {found.get('version')} of the file"
    there, here = found.get("fingerprint") or {}, wanted["fingerprint"]
    for name in here:
        if there.get(name) != here[name]:
            return f"its {name}: {_short(there.get(name))}, now {_short(here[name])}"
    return "its header has more entries"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
