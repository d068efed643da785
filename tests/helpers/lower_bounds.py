"""The oldest versions that pyproject.toml allows: what `make lower-bounds` installs, and whether it got it.

``python lower_bounds.py`` prints the requirements; ``--check`` compares them with what the running Python has.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import tomllib

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
SHARED = {"torch", "tensorrt", "tensorrt-rtx-cu13", "onnxruntime-gpu"}
"""Gigabytes, of which the tests have one version; onnxruntime-gpu lies in the same files as onnxruntime."""
TOOLS = {"clang-format", "import-linter", "mypy", "ruff", "uv"}
"""They look at the code and are not run with it."""
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)(?P<extras>\[[^\]]*\])?(?P<versions>.*)")


def requirements() -> dict[str, str]:
    """The requirements of all extras, by the name of the package."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    found = {name: line for line in listed if (name := _parts(line)["name"]) not in {"vkvx", *SHARED, *TOOLS}}
    if twice := [line for line in listed if found.get(_parts(line)["name"], line) != line]:
        raise ValueError(f"pyproject.toml has another requirement for {', '.join(twice)} elsewhere; give one")
    return found


def lowest(requirement: str) -> str:
    """The lower bound of a requirement; ValueError where it has none."""
    found = re.search(r"[>=]=([\d.]+)", _parts(requirement)["versions"])
    if found is None:
        raise ValueError(f"{requirement} in pyproject.toml has no lower bound")
    return found[1]


def differing() -> Iterator[str]:
    """Packages of which the running Python has another version than the lowest."""
    for name, requirement in requirements().items():
        if _numbers(there := version(name)) != _numbers(bound := lowest(requirement)):
            yield f"{name} {there} is installed where pyproject.toml allows {bound}: other packages need more, raise it"


def _parts(requirement: str) -> re.Match[str]:
    found = _REQUIREMENT.fullmatch(requirement)
    assert found is not None
    return found


def _numbers(text: str) -> list[int]:
    """A version without zeros at its end, which say nothing."""
    numbers = [int(part) for part in text.split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers


if __name__ == "__main__":
    if sys.argv[1:] != ["--check"]:
        print("\n".join(requirements().values()))
    elif lines := list(differing()):
        sys.exit("\n".join(lines))
