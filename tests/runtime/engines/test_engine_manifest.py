"""The manifest of an engine directory: what it refuses, and what it finds out about files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vkvx.errors import EngineError
from vkvx.manifest import FileInfo, sha256
from vkvx.runtime.engines.manifest import (
    FILE_NAME,
    FORMAT_VERSION,
    EngineInfo,
    EngineManifest,
    EngineTensor,
    Limits,
    PluginInfo,
    Profile,
    bundle_hash,
    directory_name,
    engine_directories,
)

CONTENTS = {"decoder.engine": b"decoder", "vision.engine": b"vision", "libplugin.so": b"plugin"}


def make(directory: Path, **changes: Any) -> EngineManifest:
    """A small manifest and its files."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, contents in CONTENTS.items():
        (directory / name).write_bytes(contents)
    files = {name: FileInfo(len(contents), sha256(directory / name)) for name, contents in CONTENTS.items()}
    shape = ((1, 1), (1, 2), (2, 4))
    manifest = EngineManifest(
        vkvx_version="0.1.0",
        operator_version=1,
        backend="rtx",
        library_version="1.7.1.116",
        compute_capabilities=("8.9",),
        bundle_hash="0" * 64,
        plugin=PluginInfo("libplugin.so", files["libplugin.so"].sha256, False),
        limits=Limits(2, 2, 4, 640, 16, 1),
        empty_visual_index=True,
        engines={
            "decoder": EngineInfo("decoder.engine", 12, 4),
            "vision": EngineInfo("vision.engine", 9, 0),
        },
        profiles=(
            Profile("decoder", 0, "prefill", {"past.0.text_key": shape}),
            Profile("decoder", 1, "decode", {"past.0.text_key": shape}),
            Profile("vision", 0, "vision", {"pixel_values": shape}),
        ),
        tensors=(
            EngineTensor("past.0.text_key", "input", "float16", ("B", "N"), "decoder"),
            EngineTensor("present.0.text_key", "output", "float16", ("B", "N"), "decoder"),
            EngineTensor("pixel_values", "input", "float32", ("P", 3), "vision"),
        ),
        aliases={"present.0.text_key": "past.0.text_key"},
        files=files,
        options={"workspace": None, "strip_plan": False, "optimization_level": 3, "timing_cache": "x"},
        cache_key="1" * 64,
    )
    manifest = replace(manifest, **changes)
    manifest.save(directory)
    return manifest


def test_round_trip_and_lookups(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    loaded = EngineManifest.load(tmp_path)
    assert loaded == manifest
    loaded.verify(tmp_path)
    assert loaded.profile("decoder", "decode").index == 1
    with pytest.raises(KeyError):
        loaded.profile("vision", "decode")
    assert [tensor.name for tensor in loaded.engine_tensors("decoder", "output")] == ["present.0.text_key"]


@pytest.mark.parametrize(
    ("shape", "taken"), [((1, 1), True), ((2, 4), True), ((2, 5), False), ((0, 1), False), ((1,), False)]
)
def test_profile_says_which_shapes_it_takes(tmp_path: Path, shape: tuple[int, ...], taken: bool) -> None:
    assert make(tmp_path).profile("decoder", "prefill").takes("past.0.text_key", shape) is taken


def test_plugin_may_be_absent_or_embedded(tmp_path: Path) -> None:
    make(tmp_path, plugin=None)
    assert EngineManifest.load(tmp_path).plugin is None
    make(tmp_path, plugin=PluginInfo("elsewhere.so", "2" * 64, True))
    assert EngineManifest.load(tmp_path).plugin == PluginInfo("elsewhere.so", "2" * 64, True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "no engine directory"),
        ({"format_version": FORMAT_VERSION + 1}, "upgrade"),
        ({"format_version": True}, "format_version must be an integer, got True"),
        (
            {"operator_version": 99},
            r"operator version 99, this vkvx has 1; install a newer vkvx, or run `vkvx build",
        ),
        ({"operator_version": 10**400}, "operator_version must be a number of at most 64 bits"),
        ({"backend": "vulkan"}, "one of tensorrt, rtx"),
        ({"compute_capabilities": []}, "1 to 64 entries"),
        ({"limits": {"batch_size": 1}}, "limits.slots is missing"),
        ({"engines": {}}, 'the key "decoder"'),
        ({"files": {"../x": {"bytes": 1, "sha256": "0" * 64}}}, "do not trust"),
        ({"files": {}}, "listed in files"),
        ({"profiles": []}, "a list with one named prefill"),
        ({"aliases": {"present.0.text_key": "past.1.text_key"}}, "aliases"),
        ({"plugin": {"file": "no.so", "sha256": "0" * 64, "embedded": False}}, "plugin.file"),
        (
            {"plugin": {"file": "no.so", "sha256": "0" * 64, "embedded": 0}},
            "plugin.embedded must be true or false",
        ),
        ({"empty_visual_index": None}, "empty_visual_index must be true or false"),
        ({"options": {"a": 1.5}}, "options"),
    ],
)
def test_refusals(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    make(tmp_path)
    path = tmp_path / FILE_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(EngineError, match=words):
        EngineManifest.load(tmp_path)


def test_profile_must_name_every_input(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    path = tmp_path / FILE_NAME
    data = manifest.to_json()
    data["profiles"][0]["shapes"] = {}
    path.write_text(json.dumps(data))
    with pytest.raises(EngineError, match="profile prefill"):
        EngineManifest.load(tmp_path)


def _remove(path: Path) -> None:
    path.unlink()


def _shorten(path: Path) -> None:
    path.write_bytes(b"deco")


def _link(path: Path) -> None:
    path.rename(path.parents[1] / "real")
    path.symlink_to("../real")


@pytest.mark.parametrize(("harm", "words"), [(_remove, "missing"), (_shorten, "4 bytes"), (_link, "link that leaves")])
def test_damage_that_load_sees(tmp_path: Path, harm: Callable[[Path], None], words: str) -> None:
    make(tmp_path / "engines")
    harm(tmp_path / "engines" / "decoder.engine")
    with pytest.raises(EngineError, match=words):
        EngineManifest.load(tmp_path / "engines")


def test_damage_that_verify_sees(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    (tmp_path / "vision.engine").write_bytes(b"Vision")
    EngineManifest.load(tmp_path)
    with pytest.raises(EngineError, match=r"vision\.engine differs"):
        manifest.verify(tmp_path)


def test_no_directory_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="vkvx build"):
        EngineManifest.load(tmp_path)
    (tmp_path / FILE_NAME).write_bytes(b"\xff{")
    with pytest.raises(EngineError, match="not valid JSON"):
        EngineManifest.load(tmp_path)


def test_another_bundle(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "vkvx.json").write_text("{}")
    manifest = make(tmp_path / "engines", bundle_hash=bundle_hash(bundle))
    manifest.check_bundle(bundle)
    (bundle / "vkvx.json").write_text("{ }")
    with pytest.raises(EngineError, match="vkvx build"):
        manifest.check_bundle(bundle)
    with pytest.raises(EngineError, match="cannot read"):
        bundle_hash(tmp_path)


def test_directories_of_a_bundle(tmp_path: Path) -> None:
    for name in ("tensorrt-9.0", directory_name("rtx", ("8.6", "8.9")), ".rtx-8.9.partial"):
        make(tmp_path / "engines" / name)
    (tmp_path / "engines" / "empty").mkdir()
    assert [path.name for path in engine_directories(tmp_path)] == ["rtx-8.6+8.9", "tensorrt-9.0"]
