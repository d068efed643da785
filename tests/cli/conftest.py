"""Running a command in the process of the tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from commands import Result

from vkvx.cli import main


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """``cli("inspect", bundle)``: exit code and output of a command."""

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call
