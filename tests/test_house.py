"""CONTRIBUTING's table of rooms is what import-linter checks."""

from __future__ import annotations

import re
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]


def contract(name: str) -> list[list[str]]:
    """The layers of a contract of import-linter, from the top, each as its sorted modules."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (found,) = (entry for entry in contracts if entry["name"] == name)
    return [sorted(re.findall(r"\w+", layer)) for layer in found["layers"]]


def test_table_of_rooms_is_the_contract() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", text, flags=re.MULTILINE)
    rooms = [sorted(re.findall(r"`([\w.]+)`", row)) for row in rows]
    top, runtime = contract("arrows run down"), contract("arrows run down in the runtime")
    at = top.index(["runtime"])
    inside = [[f"runtime.{name}" for name in layer] for layer in runtime]
    assert rooms == [*top[:at], *inside, *top[at + 1 :]]
