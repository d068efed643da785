"""A pytest plugin that holds the matrix in docs/models.md against what tests/families/test_families.py found.

It speaks up at the end of runs in which all of that file ran, whole or spread over processes: the run fails if the page
says otherwise, and ``--write-matrix`` rewrites the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

TESTS = "tests/families/test_families.py"
PAGE = "docs/models.md"
COMMAND = f"python -m pytest {TESTS} --write-matrix"

COLUMNS = {
    "test_bundles_are_exported": "export",
    "test_prompts_and_pixels_are_those_of_transformers": "prompts",
    "test_greedy_answers_of_a_batch": "16 bits",
    "test_second_turn_with_another_picture": "second turn",
    "test_prompts_in_pieces": "pieces",
    "test_one_bit_is_that_of_the_plug_in": "1 bit",
    "test_evaluation_of_bundle_and_checkpoint": "eval",
    "test_engines_are_built": "engines",
}
"""The heading of what each test function tells of a checkpoint."""
FIRST = ("tested checkpoint", "family", "decoder")

YES, NO, UNKNOWN = "yes", "no", "–"
MACHINE = "needs "
"""How reasons begin that tell of this machine, not of the checkpoint."""

Rows = list[list[str]]


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--write-matrix``."""
    parser.addoption("--write-matrix", action="store_true", help=f"write what {TESTS} finds into {PAGE}")


def pytest_configure(config: pytest.Config) -> None:
    """Processes of pytest-xdist report to the one that started them, which alone sees everything."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Matrix(config.rootpath / PAGE, write=config.getoption("--write-matrix")))


class Matrix:
    """Collects the outcome of each test, and compares or writes the page at the end."""

    def __init__(self, page: Path, *, write: bool) -> None:
        self._page, self._write = page, write
        self._found: dict[str, str] = {}
        self._message = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called for set-up, call and tear-down of each test."""
        path, _, name = report.nodeid.partition("::")
        if path == TESTS and (outcome := outcome_of(report)):
            self._found[name] = worst([outcome, self._found.get(name, outcome)])

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Fail the run if the page differs."""
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not (self._write or self._found):
            return
        from families import CASES

        results = cells(self._found, [case.preset for case in CASES])
        if results is None:
            self._message = f"the matrix was not written: not all of {TESTS} ran" if self._write else ""
        elif self._write:
            self._page.write_text(replaced(self._page.read_text("utf-8"), rows_of(results)), "utf-8")
        else:
            self._message = difference(table_of(self._page.read_text("utf-8")), rows_of(results))
        if self._message and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Say why."""
        if self._message:
            terminalreporter.section("matrix of families", red=True)
            terminalreporter.line(self._message)


def outcome_of(report: pytest.TestReport) -> str:
    """The cell that a report stands for; empty for a set-up or tear-down that passed."""
    if report.failed or hasattr(report, "wasxfail"):
        return NO
    if report.skipped:
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")  # type: ignore[index]
        return UNKNOWN if reason.startswith(MACHINE) else f"{UNKNOWN} {reason}"
    return YES if report.when == "call" else ""


def worst(outcomes: Iterable[str]) -> str:
    """One cell for several outcomes: a failure counts most, then what was skipped."""
    return min(outcomes, key=lambda cell: (cell != NO, cell == YES))


def cells(found: Mapping[str, str], presets: Iterable[str]) -> dict[str, list[str]] | None:
    """The cells of each preset, from the outcomes of tests by name; None if a test is missing."""
    table = {}
    for preset in presets:
        names = [f"{test}[{preset}]" for test in COLUMNS]
        if any(name not in found for name in names):
            return None
        table[preset] = [found[name] for name in names]
    return table


def rows_of(results: Mapping[str, list[str]]) -> Rows:
    """The table: a row of headings, then one of each preset."""
    from vkvx.models.presets import preset_config
    from vkvx.models.registry import FAMILIES

    rows = [[*FIRST, *COLUMNS.values()]]
    for preset, outcomes in results.items():
        config = preset_config(preset)
        family = FAMILIES[config.architectures[0]].variant(config)
        rows.append([f"`{preset}`", family.title, config.text_config.model_type, *outcomes])
    return rows


def table_of(text: str) -> Rows:
    """The table of a page; empty if it has none."""
    lines = _lines(text)[1]
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    return rows[:1] + rows[2:]


def difference(page: Rows, found: Rows) -> str:
    """What to tell if the page's table is not the one found; what this machine cannot tell is not compared."""
    known = {row[0]: row for row in page}
    differing = [
        row[0].strip("`")
        for row in found
        if len(there := known.get(row[0], [])) != len(row)
        or any(mine not in (UNKNOWN, other) for mine, other in zip(row, there, strict=True))
    ]
    if not differing and [row[0] for row in page] == [row[0] for row in found]:
        return ""
    where = f" ({', '.join(differing)})" if differing else ""
    return f"the matrix in {PAGE} is not what the tests found{where}; `{COMMAND}` writes it"


def replaced(text: str, rows: Rows) -> str:
    """The page with this table in place of the one that it has."""
    before, _, after = _lines(text)
    lines = [f"| {' | '.join(row)} |\n" for row in rows]
    return "".join([*before, lines[0], f"|{'---|' * len(rows[0])}\n", *lines[1:], *after])


def _lines(text: str) -> tuple[list[str], list[str], list[str]]:
    """Lines before the table, of it, and after it; without a table all are before it."""
    lines = text.splitlines(keepends=True)
    start = next((i for i, line in enumerate(lines) if line.startswith(f"| {FIRST[0]} |")), len(lines))
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    return lines[:start], lines[start:end], lines[end:]
