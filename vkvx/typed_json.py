"""Reads parsed JSON as frozen dataclasses: strict about what a key must hold, silent about keys it does not know.

Standard library only. The manifests of bundles and of engines are read with it.
"""

from __future__ import annotations

import math
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import TypeVar

_T = TypeVar("_T")
Failure = Callable[[str], Exception]
"""Makes the error to raise from words such as ``model.layers must be an integer, got 'x'``."""

_WORDS = {"int": "an integer", "str": "a string", "bool": "true or false", "NoneType": "null", "float": "a number"}


def read(expected: type[_T], value: object, fail: Failure, where: str = "") -> _T:
    """Read ``value`` as a dataclass, or as what a dataclass' field is annotated with; raises what ``fail`` makes.

    Fields may be dataclasses, int, float, str, bool, ``tuple[X, ...]``, ``dict[str, X]`` and unions of scalars, or of
    a dataclass and None. Integers have at most 64 bits. Fields that the class names in ``OPTIONAL`` may be missing.
    """
    if isinstance(value, int) and not -(2**63) <= value < 2**63:  # not shown: it may have any number of digits
        raise fail(f"{where} must be a number of at most 64 bits")
    result: object
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if is_dataclass(expected):
        if not isinstance(value, Mapping):
            raise _mismatch(fail, where, "an object", value)
        kinds = typing.get_type_hints(expected)
        hints = {field.name: kinds[field.name] for field in fields(expected)}
        missing = [name for name in hints if name not in value]
        for name in missing:
            if name not in getattr(expected, "OPTIONAL", ()):
                raise fail(f"{_join(where, name)} is missing")
            del hints[name]
        result = expected(**{name: read(hint, value[name], fail, _join(where, name)) for name, hint in hints.items()})
    elif origin is tuple:
        if not isinstance(value, list | tuple):
            raise _mismatch(fail, where, "a list", value)
        result = tuple(read(arguments[0], item, fail, f"{where}[{i}]") for i, item in enumerate(value))
    elif origin is dict:
        if not isinstance(value, Mapping):
            raise _mismatch(fail, where, "an object", value)
        result = {key: read(arguments[1], item, fail, f"{where}[{key!r}]") for key, item in value.items()}
    elif origin is types.UnionType and value is not None and is_dataclass(arguments[0]):
        result = read(typing.cast(type, arguments[0]), value, fail, where)
    elif origin is types.UnionType:
        if not any(_is(kind, value) for kind in arguments):
            names = " or ".join(_WORDS.get(kind.__name__, "an object") for kind in arguments)
            raise _mismatch(fail, where, names, value)
        result = value
    elif expected is float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise _mismatch(fail, where, "a number", value)
        result = float(value)
    else:
        if not _is(expected, value):
            raise _mismatch(fail, where, _WORDS[expected.__name__], value)
        result = value
    return typing.cast(_T, result)


def is_plain_path(name: str) -> bool:
    """Whether a name from a manifest is a relative path with forward slashes that stays in its directory."""
    path = PurePosixPath(name)
    plain = name not in ("", ".") and str(path) == name and ".." not in path.parts and not set(name) & set("\\\0")
    return plain and not path.is_absolute() and not PureWindowsPath(name).drive


def _is(kind: type, value: object) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _mismatch(fail: Failure, where: str, expected: str, value: object) -> Exception:
    return fail(f"{where} must be {expected}, got {reprlib.repr(value)}")
