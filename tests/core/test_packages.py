"""What is said of a package that cannot be imported: the one that is at fault, and what helps."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

from vkvx import packages
from vkvx.cli import EXIT_ERROR, explain
from vkvx.errors import DependencyError
from vkvx.packages import extra, missing, require

FILES = {
    "whole_lacks": "import absent_package",
    "whole_old": "from json import no_such_name",
    "whole_part": "import json.no_such_part",
    "whole_lazy": "try:\n    import absent_package\nexcept ImportError as error:\n"
    "    raise ModuleNotFoundError('Could not import it') from error",
    "whole_wrapped": "try:\n    import absent_package\nexcept ImportError as error:\n"
    "    raise ImportError('Could not import it') from RuntimeError('bad luck')",
    "whole_binary": "raise ImportError('libfoo.so.1: cannot open shared object file')",
}


def fails(module: str) -> ImportError:
    with pytest.raises(ImportError) as error:
        importlib.import_module(module)
    return error.value


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("absent_package", "the Python package 'absent_package' is missing; run `pip install 'absent_package'`"),
        ("whole_lacks", "'absent_package', which 'whole_lacks' needs, is missing; run `pip install 'absent_package'`"),
        ("whole_lazy", "'absent_package', which 'whole_lazy' needs, is missing"),
        ("whole_old", "'json' is installed but cannot be imported: cannot import name 'no_such_name' from 'json'"),
        ("whole_part", "'json' is installed but cannot be imported: No module named 'json.no_such_part'"),
        ("whole_wrapped", "'whole_wrapped' is installed but cannot be imported: bad luck; run `pip install 'whole_wra"),
        ("whole_binary", "'whole_binary' is installed but cannot be imported: libfoo.so.1: cannot open shared object"),
    ],
)
def test_the_package_at_fault_is_named(module: str, words: str) -> None:
    error = fails(module)
    assert words in str(missing(module, error))
    assert "\n" not in str(missing(module, error))
    if error.name:
        assert explain(error)[1] == EXIT_ERROR


def test_all_that_is_missing_is_named_with_the_extra() -> None:
    require("eval", "json", "numpy")
    with pytest.raises(DependencyError, match=re.escape(f"package 'absent' is missing; run {extra('eval')}")):
        require("eval", "json", "absent")
    with pytest.raises(DependencyError, match="packages 'a1', 'scikit-learn2' and 'a3' are missing; run"):
        require("eval", "a1", "numpy", "scikit-learn2", "a3")


def test_versions_that_vkvx_allows_are_named() -> None:
    assert "run `pip install 'transformers<6,>=5.20'`" in str(missing("transformers"))
    old = ImportError("cannot import name 'X' from 'transformers'", name="transformers")
    assert "'transformers' is installed but" in str(missing("torch", old))
    assert "pip install 'transformers<6,>=5.20'" in str(missing("torch", old))


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        ({"url": "WHEEL", "archive_info": {}}, "'WHEEL[rtx,video]'"),
        ({"url": "gone.whl", "archive_info": {}}, "'PATH[rtx,video]'"),
        ({"url": "https://a.example/v.whl", "archive_info": {}}, "'vkvx[rtx,video] @ https://a.example/v.whl'"),
        ({"url": "https://a.example/v", "vcs_info": {"vcs": "git"}}, "'vkvx[rtx,video] @ git+https://a.example/v'"),
        (None, "'vkvx[rtx,video]'"),
    ],
)
def test_extras_come_from_where_vkvx_came(
    origin: dict[str, object] | None, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel, a wheel that is gone, addresses, an index: what pip notes beside the package (PEP 610)."""
    wheel = tmp_path / "a wheel.whl"
    wheel.touch()
    information = tmp_path / "vkvx-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: vkvx\nVersion: 1.0\n")
    if origin is not None:
        url = str(origin["url"])
        place = url if "://" in url else (wheel if url == "WHEEL" else tmp_path / url).as_uri()
        (information / "direct_url.json").write_text(json.dumps({**origin, "url": place}))
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.setattr(packages, "__file__", str(tmp_path / "site-packages/vkvx/packages.py"))
    assert packages.extra("rtx,video").startswith(f"`pip install {command.replace('WHEEL', str(wheel))}`")


def test_extras_of_a_clone_come_from_the_clone() -> None:
    assert packages.extra("video") == f"`pip install -e '{Path(__file__).parents[2]}[video]'`"


def test_the_command_line_names_no_package_that_it_does_not_know() -> None:
    text, code = explain(ImportError("libfoo.so.1: cannot open shared object file"))
    assert code == EXIT_ERROR
    assert text == "a Python package cannot be imported: libfoo.so.1: cannot open shared object file; see `vkvx doctor`"
