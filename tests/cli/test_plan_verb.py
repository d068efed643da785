"""The verb `plan`."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from vkvx import OptionError
from vkvx.cli.terminal import parse_bytes


def test_plan_prints_a_table_or_json(cli: Callable) -> None:
    table = cli("plan", "tiny-llava", "--gpu-memory", "1GiB", "--bits", "16,1")
    assert table.code == 0
    assert "576 visual tokens" in table.out
    assert [line.split()[0] for line in table.out.splitlines() if line.strip()[:1].isdigit()] == ["16", "1"]
    data = json.loads(cli("plan", "tiny-llava", "--gpu-memory", "1GiB", "--bits", "16,1", "--json").out)
    assert [row["bits"] for row in data["rows"]] == [16, 1]
    assert data["cache"] == data["memory"] - data["reserve"] - data["weights"]


@pytest.mark.parametrize(
    "wrong",
    [
        ("--gpu-memory", "much"),
        ("--gpu-memory", "0GB"),
        ("--gpu-memory", "24"),
        ("--gpu-memory", "1GiB", "--pictures", "5000"),
        ("--gpu-memory", "1GiB", "--text-tokens", "5000"),
        ("--gpu-memory", "1MiB"),
        ("--gpu-memory", "1GiB", "--bits", "1,x"),
        ("--gpu-memory", "1GiB", "--group-size", "100"),
        (),
    ],
)
def test_wrong_options_are_one_line(cli: Callable, wrong: tuple[str, ...]) -> None:
    result = cli("plan", "tiny-llava", *wrong)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("vkvx: error: ")
    assert result.err.count("\n") == 1


def test_sizes() -> None:
    assert parse_bytes("24GiB", "--x") == 24 << 30
    assert parse_bytes("80GB", "--x") == 80 * 10**9
    assert parse_bytes("1.5 MiB", "--x") == 3 << 19
    assert parse_bytes("4096 B", "--x") == 4096
    for bare in ("24", "1.5", "25769803776"):
        with pytest.raises(OptionError, match=rf"--x {bare} has no unit: give a size such as {bare}GiB"):
            parse_bytes(bare, "--x")
    for wrong in ("", "GiB", "-1GiB", "1QB", "0.1B", "24G"):
        with pytest.raises(OptionError, match="--x"):
            parse_bytes(wrong, "--x")
