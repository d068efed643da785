"""The verb `build`, and `inspect` on what it built."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import run_process
from engine_calls import copy_bundle

from vkvx.cli.terminal import parse_bytes
from vkvx.errors import OptionError
from vkvx.plugins import build as plugin_build
from vkvx.runtime.engines import build as engine_build


@pytest.fixture(scope="module")
def plugin(plugin_builds: Any) -> Path:
    path: Path = plugin_builds.plugin(3)
    return path


@pytest.fixture(scope="module")
def built(tiny_bundle: Path, plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A bundle with engines, built by a process of its own, and what that printed."""
    bundle = copy_bundle(tiny_bundle, tmp_path_factory.mktemp("build") / "bundle")
    found = run_process("build", bundle, "--compute-capability", "8.9", "--plugin", plugin, "--json")
    assert found.code == 0, found.err
    assert "decoder engine" in found.err
    return bundle, json.loads(found.out)


def test_build(built: tuple[Path, dict[str, Any]]) -> None:
    bundle, report = built
    assert report["engines"] == str(bundle / "engines" / "rtx-8.9")
    assert report["built"] is True
    assert report["plugin_layers"] == 4
    assert report["seconds"] > 0
    assert report["compute_capabilities"] == ["8.9"]
    assert set(report["files"]) == {"decoder.engine", "vision.engine", "libvkvx_tensorrt.so"}


def test_predicted_memory_is_near_what_it_took(built: tuple[Path, dict[str, Any]]) -> None:
    _, report = built
    assert report["predicted_memory"] == pytest.approx(report["peak_memory"], rel=0.3)


def test_a_second_build_takes_what_the_first_made(built: tuple[Path, dict[str, Any]], plugin: Path) -> None:
    bundle, _ = built
    found = run_process("build", bundle, "--compute-capability", "8.9", "--plugin", plugin)
    assert found.code == 0
    assert "built before from the same inputs" in found.out
    assert "4 plugin layers" in found.out
    assert found.err == ""


def test_the_default_plugin(
    cli: Callable, built: tuple[Path, dict[str, Any]], plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(plugin_build.OVERRIDES[plugin_build.TENSORRT], str(plugin))
    found = cli("build", built[0], "--compute-capability", "8.9", "--json")
    assert json.loads(found.out)["built"] is False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--compute-capability"),
        (["--compute-capability", "9.0"], "--backend tensorrt"),
        (["--compute-capability", "8.9", "--timing-cache", "x"], "offers no --timing-cache"),
        (["--compute-capability", "8.9", "--max-visual-tokens", "0"], "at least 640"),
        (["--compute-capability", "8.9", "--memory", "1MiB"], "--memory"),
        (["--compute-capability", "8.9", "--memory", "much"], "such as 24GiB"),
        (["--compute-capability", "8.9", "--plugin", "nowhere.so"], "nowhere.so is no file"),
        (["--backend", "vulkan"], "invalid choice"),
    ],
)
def test_refusals_are_one_line(
    cli: Callable, built: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.setattr(engine_build, "list_gpus", list)
    found = cli("build", built[0], *arguments)
    assert found.code == 2
    assert found.err.startswith("vkvx: error: ")
    assert found.err.count("\n") == 1
    assert words in found.err


def test_another_output(cli: Callable, built: tuple[Path, dict[str, Any]], plugin: Path, tmp_path: Path) -> None:
    """Engines that are there already stand for those that would be built."""
    bundle, _ = built
    common = ("build", bundle, "--compute-capability", "8.9", "--plugin", plugin, "--output")
    shutil.copytree(bundle / "engines" / "rtx-8.9", tmp_path / "mine")
    found = json.loads(cli(*common, tmp_path / "mine", "--json").out)
    assert (found["engines"], found["built"]) == (str(tmp_path / "mine"), False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert "other exists and is no engine directory; it is never" in cli(*common, tmp_path / "other").err
    assert "absent is no directory; create it, or give another output=" in cli(*common, tmp_path / "absent" / "x").err
    assert not (tmp_path / "absent").exists()


def test_a_bundle_that_cannot_be_written_to_is_told_before_anything_is_compiled(
    cli: Callable, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = copy_bundle(tiny_bundle, tmp_path / "bundle")
    (bundle / "engines").touch()  # no folder can be made, also by root
    monkeypatch.setattr(plugin_build, "find_library", lambda *_: None)
    monkeypatch.setattr(plugin_build, "build_plugin", None)
    found = cli("build", bundle, "--compute-capability", "8.9")
    assert found.code == 2
    assert f"cannot write to {bundle / 'engines'}: File exists; change its rights, or give another output=" in found.err


def test_what_is_no_bundle(cli: Callable, tmp_path: Path) -> None:
    found = cli("build", tmp_path, "--compute-capability", "8.9")
    assert found.code == 2
    assert "is no vkvx bundle" in found.err


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24GiB", 24 << 30), ("1.5 gib", 3 << 29), ("512MB", 512 * 10**6), ("7KiB", 7 << 10), ("1024B", 1024)],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text, "--memory") == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1TiB", "1 G", "1024"])
def test_sizes_that_are_not_understood(text: str) -> None:
    with pytest.raises(OptionError, match="--memory"):
        parse_bytes(text, "--memory")


def test_inspect_engines(cli: Callable, built: tuple[Path, dict[str, Any]]) -> None:
    directory = built[0] / "engines" / "rtx-8.9"
    text = cli("inspect", directory, "--verify").out
    assert "every file matches its SHA-256" in text
    assert "4 of the plugin" in text
    assert "[1, 0] to [4, 1280]" in text
    assert "in place of past.0.visual_key\n" in text
    assert "past.1." not in text
    report = json.loads(cli("inspect", directory, "--json").out)
    assert report["network"]["decoder"]["plugin_layers"] == 4
    assert [profile["name"] for profile in report["profiles"]] == ["prefill", "decode", "vision"]
    assert report["files"]["decoder.engine"] == (directory / "decoder.engine").stat().st_size
    assert "only" in report["layers"]["decoder"]["reason"] or report["layers"]["decoder"]["layers"]


def test_inspect_lists_the_engines_of_a_bundle(
    cli: Callable, built: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    (engines,) = json.loads(cli("inspect", built[0], "--json").out)["engines"]
    assert (engines["name"], engines["backend"], engines["compute_capabilities"]) == ("rtx-8.9", "rtx", ["8.9"])
    assert engines["error"] is None
    (line,) = (line for line in cli("inspect", built[0]).out.splitlines() if line.startswith("  rtx-8.9 "))
    assert f"TensorRT for RTX {engines['library_version']}, " in line
    copy = Path(shutil.copytree(built[0], tmp_path / "copy", ignore=shutil.ignore_patterns("engines")))
    (copy / "engines" / "rtx-8.9").mkdir(parents=True)
    (copy / "engines" / "rtx-8.9" / "engine.json").write_text("{")
    (damaged,) = json.loads(cli("inspect", copy, "--json").out)["engines"]
    assert damaged["name"] == "rtx-8.9"
    assert damaged["error"] in cli("inspect", copy).out


def test_inspect_damaged_engines(cli: Callable, built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    copy = tmp_path / "rtx-8.9"
    shutil.copytree(built[0] / "engines" / "rtx-8.9", copy)
    path = copy / "decoder.engine"
    contents = bytearray(path.read_bytes())
    contents[1000] ^= 1
    path.write_bytes(contents)
    assert cli("inspect", copy).code == 0
    found = cli("inspect", copy, "--verify")
    assert found.code == 2
    assert "decoder.engine differs from what was built" in found.err
    path.write_bytes(contents[:-1])
    assert "run `vkvx build BUNDLE --force`" in cli("inspect", copy).err
