"""The verb `plugin`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vkvx.plugins import build


def test_path_and_build(cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.CACHE, str(tmp_path))
    monkeypatch.delenv(build.OVERRIDE, raising=False)
    result = cli("plugin", "path")
    assert result.code == 2
    assert "run `vkvx plugin build`" in result.err
    ours = tmp_path / f"{build.source_hash()}-90" / build.LIBRARY
    ours.parent.mkdir(parents=True)
    ours.touch()
    assert cli("plugin", "path").out == f"{ours}\n"
    assert cli("plugin", "build", "--arch", "90").out == f"{ours}\n"
    assert cli("plugin", "build", "--arch", "sm90").code == 2
    assert cli("plugin").code == 2
