"""What the verbs share: plain or progress output, sizes for people, and silence from the libraries."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from vkvx.errors import OptionError, StorageError

_BYTES_FROM = 1 << 20  # a stage with at least this many units counts bytes; none has so many steps


def quieten(debug: bool) -> None:
    """Keep the warnings and progress bars of libraries out of the output. Call before they are imported."""
    if debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")
    for name in ("transformers", "torch", "onnxscript", "onnx_ir", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


def storage_error(error: OSError) -> Exception:
    """A StorageError that says what to do for a full disk or missing rights; otherwise the system's own words."""
    name = error.filename if error.filename is not None else "the output"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"no space left on the disk while writing {name}; free some, or choose another directory with -o"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"no permission for {name}; change its rights, or choose another path")
    return OSError(f"{error.strerror or error}: {name}")


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    json.dump(data, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def note(text: str = "") -> None:
    """A line for the person in front of the terminal: stderr, so that stdout holds results only."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def held_warnings(logger: str) -> Iterator[list[str]]:
    """Collects the warnings of a logger, so that they can be told when a progress bar is out of the way."""

    class Held(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    messages: list[str] = []
    handler, log = Held(logging.WARNING), logging.getLogger(logger)
    propagate, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield messages
    finally:
        log.removeHandler(handler)
        log.propagate = propagate


def printable(text: str) -> str:
    """Text of a model for a terminal: without control characters, which move the cursor and worse; else as it is."""
    if not sys.stdout.isatty():
        return text
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def human_bytes(count: float) -> str:
    """``1,234 B``, ``95.0 KiB``, ``12.3 MiB``, ``4.56 GiB``."""
    for unit, digits in (("B", 0), ("KiB", 1), ("MiB", 1)):
        if count < 1024:
            return f"{count:,.{digits}f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"


def parse_bytes(text: str, option: str) -> int:
    """``24GiB``, ``80GB``, ``512MiB`` or ``4096B``, in bytes, more than 0; OptionError names the option.

    A number alone is none: who writes 24 for the memory of a GPU does not mean bytes.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmg])(i?))?(b?)", text.strip().lower())
    if found is not None and found[1] == text.strip():
        raise OptionError(f"{option} {text} has no unit: give a size such as {text.strip()}GiB")
    count = 0
    if found is not None and found[4]:
        number, prefix, binary, _ = found.groups()
        count = int(float(number) * (1024 if binary else 1000) ** " kmg".index(prefix or " "))
    if count <= 0:
        raise OptionError(f"{option} {text} is not understood: give a size such as 24GiB or 80GB")
    return count


def ranges(values: Iterable[Any]) -> list[tuple[str, Any]]:
    """Equal neighbours as one entry: ``[1, 1, 8]`` becomes ``[("0-1", 1), ("2", 8)]``."""
    runs: list[list[Any]] = []
    for index, value in enumerate(values):
        if runs and runs[-1][2] == value:
            runs[-1][1] = index
        else:
            runs.append([index, index, value])
    return [(str(first) if first == last else f"{first}-{last}", value) for first, last, value in runs]


def columns(rows: Sequence[Sequence[str]], justify: Callable[[str, int], str] = str.rjust) -> list[str]:
    """The lines of a table, its columns as wide as their widest cell."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return ["  ".join(map(justify, row, widths)).rstrip() for row in rows]


def heads(layers: Sequence[Mapping[str, Any]], query_heads: int) -> str:
    """Heads of layers, the fields of ``LayerInfo``: ``28 query heads, 4 KV heads, head dim 128``, and their window."""

    def each(name: str) -> str:
        return " or ".join(str(value) for value in dict.fromkeys(layer[name] for layer in layers))

    linear = [layer for layer in layers if layer["linear"] is not None]
    layers = [layer for layer in layers if layer["linear"] is None]
    text = f"{query_heads} query heads, {each('kv_heads')} KV heads, head dim {each('head_dim')}"
    windows = [layer["sliding_window"] for layer in layers if layer["sliding_window"]]
    text += f", a window of {windows[0]:,} tokens in {len(windows)} of {len(layers)} layers" if windows else ""
    return f"{text}, linear attention in {len(linear)} layers" if linear else text


class ProgressBar:
    """Shows ``progress(stage, done, total)`` on stderr: a bar on a terminal, else one line when a stage is done.

    Without ``announce`` nothing of it stays: bars vanish, and there are no lines.
    """

    def __init__(self, verb: str, announce: bool = True) -> None:
        self._verb = verb
        self._announce = announce
        self._fancy = sys.stderr.isatty()
        self._stage: str | None = None
        self._bar: Any = None
        self._begun = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self.close()
            self._stage, self._begun = stage, time.perf_counter()
            if self._fancy:
                self._bar = self._make_bar(stage, total)
        if self._bar is not None:
            if self._bar.total != total:
                self._bar.reset(total)
            self._bar.update(done - self._bar.n)

    def _make_bar(self, stage: str, total: int) -> Any:
        from tqdm import tqdm

        size = {"unit": "B", "unit_scale": True, "unit_divisor": 1024} if total >= _BYTES_FROM else {"unit": "step"}
        return tqdm(total=total, desc=f"{stage:<20}", leave=self._announce, file=sys.stderr, dynamic_ncols=True, **size)

    def close(self) -> None:
        """End the stage that is shown."""
        if self._bar is not None:
            self._bar.close()
        elif self._stage is not None and self._announce:
            note(f"{self._verb}: {self._stage} ({time.perf_counter() - self._begun:.1f} s)")
        self._bar, self._stage = None, None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and self._bar is None:
            self._stage = None  # a stage that failed is not announced as done
        self.close()
