"""Reads parsed JSON as frozen dataclasses: strict about what a key must hold, silent about keys it does not know.

Standard library only. The manifests of bundles and of engines are read with it. What a number or a string may be stands
at its field: ``vocab_size: Size``, ``dtype: Annotated[str, OneOf(FLOAT_DTYPES)]``.
"""

from __future__ import annotations

import math
import re
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any, NamedTuple

Failure = Callable[[str], Exception]
"""Makes the error to raise from words such as ``model.layers must be an integer, got 'x'``."""

_WORDS = {"int": "an integer", "str": "a string", "bool": "true or false", "NoneType": "null", "float": "a number"}
_LONGEST_PATH = 1024
_MOST = 2**31 - 1
"""What an index of the graphs can count to."""


class Between(NamedTuple):
    """A number from ``least`` to ``most``."""

    least: float
    most: float

    def takes(self, value: Any) -> bool:
        """Whether a value may be there."""
        return bool(self.least <= value <= self.most)

    def __str__(self) -> str:
        return f"{self.least:.12g} to {self.most:.12g}"


class OneOf(NamedTuple):
    """One of some values."""

    known: tuple[object, ...]

    def takes(self, value: Any) -> bool:
        """Whether a value may be there."""
        return value in self.known

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.known))}"


class Written(NamedTuple):
    """A string that a pattern matches as a whole, in words for people."""

    pattern: str
    words: str

    def takes(self, value: Any) -> bool:
        """Whether a value may be there."""
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.words


class Entries(NamedTuple):
    """A list of ``least`` to ``most`` entries."""

    least: int
    most: int

    def takes(self, value: Any) -> bool:
        """Whether a value may be there."""
        return self.least <= len(value) <= self.most

    def __str__(self) -> str:
        return f"a list of {self.least} to {self.most} entries"


Size = Annotated[int, Between(1, _MOST)]
Index = Annotated[int, Between(0, _MOST)]
Real = Annotated[float, Between(0.0, 3.4e38)]
"""A number of FP32 that is not negative."""
Bytes = Annotated[int, Between(0, 2**63 - 1)]
Sha256 = Annotated[str, Written("[0-9a-fA-F]{64}", "64 hexadecimal digits")]
Dim = Index | Annotated[str, Written(r"([1-9]\d{0,9}\*)?[A-Za-z]\w*", "a size, or a name such as P or 256*P")]
"""A dimension of a tensor: its size, or the name of a dynamic one."""


def read(expected: Any, value: Any, fail: Failure, where: str = "") -> Any:
    """Read ``value`` as a dataclass, or as what a dataclass' field is annotated with; raises what ``fail`` makes.

    Fields may be dataclasses, int, float, str, bool, ``tuple[X, ...]``, ``dict[str, X]``, unions of scalars, or of a
    dataclass and None, and any of these ``Annotated`` with what it may be. Integers have at most 64 bits. Fields that
    the class names in ``OPTIONAL`` may be missing.
    """
    if isinstance(value, int) and not -(2**63) <= value < 2**63:  # not shown: it may have any number of digits
        raise fail(f"{where} must be a number of at most 64 bits")
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is Annotated:
        result = read(arguments[0], value, fail, where)
        for condition in arguments[1:]:
            if not condition.takes(result):
                raise _mismatch(fail, where, str(condition), value)
        return result
    if isinstance(expected, type) and is_dataclass(expected):
        if not isinstance(value, Mapping):
            raise _mismatch(fail, where, "an object", value)
        hints = _hints(expected)
        missing = [name for name in hints if name not in value]
        absent = [name for name in missing if name not in getattr(expected, "OPTIONAL", ())]
        if absent:
            raise fail(f"{_join(where, absent[0])} is missing")
        given = {name: hint for name, hint in hints.items() if name not in missing}
        return expected(**{name: read(hint, value[name], fail, _join(where, name)) for name, hint in given.items()})
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _mismatch(fail, where, "a list", value)
        return tuple(read(arguments[0], item, fail, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _mismatch(fail, where, "an object", value)
        return {
            read(str, key, fail, where): read(arguments[1], item, fail, f"{where}[{reprlib.repr(key)}]")
            for key, item in value.items()
        }
    if origin in (types.UnionType, typing.Union):
        chosen = next((kind for kind in arguments if _is(_plain(kind), value)), None)
        if chosen is None:
            names = " or ".join(_WORDS.get(_plain(kind).__name__, "an object") for kind in arguments)
            raise _mismatch(fail, where, names, value)
        return read(chosen, value, fail, where)
    if not _is(expected, value):
        raise _mismatch(fail, where, _WORDS[expected.__name__], value)
    if expected is str and not value.isascii() and any("\ud800" <= sign <= "\udfff" for sign in value):
        raise fail(f"{where} must be text, got half of a surrogate pair")
    return float(value) if expected is float else value


def is_plain_path(name: str) -> bool:
    """Whether a name from a manifest is a relative path with forward slashes that stays in its directory."""
    path = PurePosixPath(name)
    plain = (
        name not in ("", ".")
        and len(name) <= _LONGEST_PATH
        and str(path) == name
        and ".." not in path.parts
        and "\\" not in name
    )
    return plain and name.isprintable() and not path.is_absolute() and not PureWindowsPath(name).drive


def _is(kind: type, value: Any) -> bool:
    if is_dataclass(kind):
        return isinstance(value, Mapping)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _plain(kind: Any) -> Any:
    """The type of a field without what it may be."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


@cache
def _hints(kind: type) -> dict[str, Any]:
    """What the fields of a dataclass are annotated with."""
    found = typing.get_type_hints(kind, include_extras=True)
    return {field.name: found[field.name] for field in fields(kind)}


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _mismatch(fail: Failure, where: str, expected: str, value: object) -> Exception:
    return fail(f"{where} must be {expected}, got {reprlib.repr(value)}")
