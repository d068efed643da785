"""The matrix in docs/models.md: what makes its cells, and the runs that it fails."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import matrix
import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]
PRESETS = [case.preset for case in families.CASES]
NAMES = [f"{test}[{preset}]" for test in matrix.COLUMNS for preset in PRESETS]
FOUND = dict.fromkeys(NAMES, matrix.YES)
LAST = f"test_engines_are_built[{PRESETS[-1]}]"


def report(when: str, outcome: str, reason: str = "", **more: Any) -> Any:
    flags = {kind: outcome == kind for kind in ("passed", "failed", "skipped")}
    return SimpleNamespace(when=when, longrepr=("file.py", 1, f"Skipped: {reason}"), **flags, **more)


@pytest.mark.parametrize(
    ("reported", "cell"),
    [
        (report("setup", "passed"), ""),
        (report("call", "passed"), "yes"),
        (report("teardown", "failed"), "no"),
        (report("call", "skipped", wasxfail="a bug"), "no"),
        (report("call", "skipped", "the first turn sees the second"), "– the first turn sees the second"),
        (report("setup", "skipped", "needs a package"), "–"),
    ],
)
def test_cell_of_a_report(reported: Any, cell: str) -> None:
    assert matrix.outcome_of(reported) == cell


def test_a_failure_counts_most() -> None:
    assert matrix.worst(["yes", "–", "no"]) == "no"
    assert matrix.worst(["yes", "– why"]) == "– why"
    assert matrix.worst(["yes", "yes"]) == "yes"


def test_every_test_of_the_file_has_a_column() -> None:
    tree = ast.parse((ROOT / matrix.TESTS).read_text(encoding="utf-8"))
    tests = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert tests == list(matrix.COLUMNS)


def test_one_outcome_changes_one_cell() -> None:
    whole = matrix.cells(FOUND, PRESETS)
    assert whole == {preset: ["yes"] * len(matrix.COLUMNS) for preset in PRESETS}
    failed = matrix.cells({**FOUND, LAST: "no"}, PRESETS)
    assert failed == {**whole, PRESETS[-1]: ["yes"] * (len(matrix.COLUMNS) - 1) + ["no"]}


def test_a_missing_outcome_leaves_no_table() -> None:
    assert matrix.cells({name: "yes" for name in NAMES if name != LAST}, PRESETS) is None
    assert matrix.cells(FOUND, [*PRESETS, "another"]) is None


def test_rows_replace_those_of_the_page() -> None:
    rows = matrix.rows_of(matrix.cells(FOUND, PRESETS) or {})
    assert rows[1][:4] == ["`tiny`", "LLaVA-1.5, Pixtral", "llama", "yes"]
    page = matrix.replaced("before\n\n| tested checkpoint |\n|---|\n| old |\n\nafter\n", rows)
    assert matrix.table_of(page) == rows
    assert page.startswith("before\n\n| tested checkpoint | family |")
    assert page.endswith(" |\n\nafter\n")
    assert matrix.replaced(page, rows) == page


@pytest.mark.parametrize(
    ("page", "found", "named"),
    [
        (["yes", "yes"], ["yes", "yes"], None),
        (["yes", "yes"], ["yes", "no"], "(a)"),
        (["yes", "no"], ["yes", "yes"], "(a)"),
        (["yes"], ["yes", "yes"], "(a)"),
        (["yes", "yes"], ["yes", "–"], None),
        (["yes", "–"], ["yes", "yes"], "(a)"),
        (["yes", "– why"], ["yes", "– another"], "(a)"),
    ],
)
def test_difference(page: list[str], found: list[str], named: str | None) -> None:
    message = matrix.difference([["`a`", *page]], [["`a`", *found]])
    assert message == "" if named is None else named in message and matrix.COMMAND in message


def test_difference_in_rows() -> None:
    row, other = ["`a`", "yes"], ["`b`", "yes"]
    assert "(b)" in matrix.difference([row], [row, other])
    assert "is not what the tests found;" in matrix.difference([row, other], [row])
    assert "(a)" in matrix.difference([], [row])


def test_the_page_has_the_rows_of_the_matrix() -> None:
    """Their cells are compared when all of the matrix has run."""
    page = matrix.table_of((ROOT / matrix.PAGE).read_text(encoding="utf-8"))
    found = matrix.rows_of(matrix.cells(FOUND, PRESETS) or {})
    fixed = len(matrix.FIRST)
    assert page[0] == found[0]
    assert [row[:fixed] for row in page] == [row[:fixed] for row in found]


@pytest.fixture
def runs(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder with a page, and stand-ins of the tests for the last two cases: they pass unless FAIL names them."""
    monkeypatch.setattr(families, "CASES", families.CASES[-2:])
    names = [name for name in NAMES if any(f"[{preset}" in name for preset in PRESETS[-2:])]
    tests = [
        f'@pytest.mark.parametrize("name", {[name[len(test) + 1 : -1] for name in names if name.startswith(test)]})\n'
        f"def {test}(request, name):\n    assert request.node.name != os.environ.get('FAIL')\n"
        for test in matrix.COLUMNS
    ]
    for path, text in (
        ("conftest.py", 'pytest_plugins = ["matrix"]\n'),
        (matrix.TESTS, "import os\nimport pytest\n\n" + "\n".join(tests)),
        (matrix.PAGE, "| tested checkpoint |\n|---|\n\nafter\n"),
    ):
        file = pytester.path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return pytester


def run(runs: pytest.Pytester, *options: str) -> pytest.RunResult:
    """In this process, where a module of the same name may have been imported."""
    return runs.runpytest("--import-mode=importlib", *options)


def test_whole_runs(runs: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(runs)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*is not what the tests found*--write-matrix*writes it*"])
    assert run(runs, "--write-matrix").ret == 0
    assert run(runs).ret == 0
    monkeypatch.setenv("FAIL", LAST)
    result = run(runs)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines([f"*what the tests found ({PRESETS[-1]})*"])


def test_whole_runs_of_several_processes(runs: pytest.Pytester) -> None:
    assert run(runs, "-n", "2", "--write-matrix").ret == 0
    rows = matrix.table_of((runs.path / matrix.PAGE).read_text(encoding="utf-8"))
    assert [row[-1] for row in rows[1:]] == ["yes", "yes"]


def test_a_part_of_the_tests_says_nothing(runs: pytest.Pytester) -> None:
    result = run(runs, "-k", PRESETS[-1])
    assert result.ret == 0
    result.stdout.no_fnmatch_line("*matrix*")
    result = run(runs, "-k", PRESETS[-1], "--write-matrix")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["the matrix was not written: not all of *"])
