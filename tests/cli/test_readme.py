"""The Python example of the README runs as it stands."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from samples import Page

README = Path(__file__).parents[2] / "README.md"


def test_python_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pages: list[Page]
) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.M | re.S)
    shutil.copy(pages[0].path, tmp_path / "page.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(README), "exec"), {})
    out = capsys.readouterr().out
    assert out.split()[:2] == [pages[0].truth.split()[1], "eos"]
    assert pages[0].truth in out
    assert re.search(r"\d\n[\d,]+ bytes of cache\n$", out)
