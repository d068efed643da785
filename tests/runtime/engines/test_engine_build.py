"""Engines of the demo model, built with TensorRT for RTX and the plugin, without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
from engine_calls import CAPABILITIES, build, copy_bundle, stripped, with_bits
from filelock import FileLock

from vkvx.errors import BuildError, DependencyError, EngineError, OptionError
from vkvx.manifest import Manifest
from vkvx.plugins import build as plugin_build
from vkvx.runtime.engines import build as engine_build
from vkvx.runtime.engines.library import PLUGIN_LIBRARIES, TensorRTLibrary, load
from vkvx.runtime.engines.limits import GivenLimits
from vkvx.runtime.engines.log import Log
from vkvx.runtime.engines.lowering import legalise
from vkvx.runtime.engines.manifest import EngineManifest, bundle_hash, engine_directories
from vkvx.runtime.engines.network import parse
from vkvx.runtime.engines.options import EMBED

DTYPES = ("float16", "bfloat16", "float32")


@pytest.fixture(scope="module")
def library() -> TensorRTLibrary:
    return load("rtx", has_gpu=False)


@pytest.fixture(scope="module")
def engines(
    tiny_bundle: Path, plugin_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, EngineManifest]:
    """A bundle with engines, not to be changed, and their manifest."""
    bundle = copy_bundle(tiny_bundle, tmp_path_factory.mktemp("engines") / "bundle")
    return bundle, build(bundle, plugin_file).manifest


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle without engines, to build in."""
    return copy_bundle(tiny_bundle, tmp_path / "bundle")


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_width_and_dtype(
    bundle_factory: Callable[..., Path], tmp_path: Path, plugin_file: Path, dtype: str, bits: int
) -> None:
    # Bundles that other tests use, too.
    options = ({} if dtype == "float16" else {"dtype": dtype}) | ({"bits": bits} if bits == 16 else {})
    one = bundle_factory(**options) if bits == 16 or dtype == "float16" else bundle_factory(bits=1, **options)
    target = tmp_path / "bundle"
    bundle = with_bits(one, target, bits) if bits in (2, 4, 8) else copy_bundle(one, target)
    result = build(bundle, plugin_file, compute_capabilities=CAPABILITIES)
    assert result.built
    assert result.directory == bundle / "engines" / "rtx-8.0+8.6+8.9+12.0"
    manifest = EngineManifest.load(result.directory)
    manifest.verify(result.directory)
    manifest.check_bundle(bundle)
    assert manifest == result.manifest
    assert manifest.compute_capabilities == CAPABILITIES
    assert manifest.engines["decoder"].plugin_layers == len(Manifest.load(bundle).model.layers) == 4
    assert manifest.engines["vision"].plugin_layers == 0
    inputs = {tensor.name: tensor for tensor in manifest.engine_tensors("decoder", "input")}
    assert inputs["past.3.text_key"].dtype == dtype
    assert inputs["past.0.visual_key"].shape[3] == (1 if bits == 16 else bits)
    assert manifest.limits.visual_tokens == (0 if bits == 16 else 640)
    assert sorted(manifest.files) == ["decoder.engine", "libvkvx_tensorrt.so", "vision.engine"]
    assert manifest.files["decoder.engine"].bytes > 5_000_000


def test_rewritten_bits_are_those_that_an_export_writes(
    bundle_factory: Callable[..., Path], tiny_bundle: Path, tmp_path: Path
) -> None:
    """What the builds above rely on."""
    exported = bundle_factory(bits=2)
    rewritten = with_bits(tiny_bundle, tmp_path / "bundle", 2)
    assert stripped(rewritten) == stripped(exported)
    assert Manifest.load(rewritten).quantization == Manifest.load(exported).quantization
    assert Manifest.load(rewritten).graphs == Manifest.load(exported).graphs


def test_the_manifest_says_what_was_built(engines: tuple[Path, EngineManifest], library: TensorRTLibrary) -> None:
    bundle, manifest = engines
    assert (manifest.backend, manifest.library_version) == ("rtx", library.version)
    assert manifest.bundle_hash == bundle_hash(bundle)
    assert manifest.plugin is not None
    assert manifest.plugin.file == PLUGIN_LIBRARIES[3]
    assert not manifest.plugin.embedded
    assert manifest.files[manifest.plugin.file].sha256 == manifest.plugin.sha256
    assert engine_directories(bundle) == [bundle / "engines" / "rtx-8.9"]


def test_profiles_are_as_promised(engines: tuple[Path, EngineManifest]) -> None:
    _, manifest = engines
    limits = manifest.limits
    assert (limits.batch_size, limits.slots, limits.visual_tokens, limits.text_tokens) == (2, 3, 640, 300)
    prefill, decode = (manifest.profile("decoder", name) for name in ("prefill", "decode"))
    assert (prefill.index, decode.index) == (0, 1)
    for profile, rows, length in ((prefill, 2, limits.input_len), (decode, 3, 1)):
        assert profile.takes("input_ids", (1, 1))
        assert profile.takes("input_ids", (rows, length))
        assert not profile.takes("input_ids", (rows + 1, length))
        assert not profile.takes("input_ids", (rows, length + 1))
        assert profile.takes("past.0.text_key", (3, 2, 300, 64))
        assert not profile.takes("past.0.text_key", (3, 2, 301, 64))
        assert profile.takes("past.3.visual_key", (3, 2, 5, 1, 128, 2))
        assert profile.takes("visual_index", (1, 0))
    assert prefill.takes("visual_embeds", (2, 640, 256))
    assert not decode.takes("visual_embeds", (1, 640, 256))
    assert manifest.profile("vision", "vision").takes("pixel_values", (1, 3, 336, 336))


def test_inputs_outputs_and_aliases(engines: tuple[Path, EngineManifest]) -> None:
    bundle, manifest = engines
    graphs = Manifest.load(bundle).graphs
    for name, graph in graphs.items():
        for kind, specs in (("input", graph.inputs), ("output", graph.outputs)):
            found = [(t.name, t.dtype, t.shape) for t in manifest.engine_tensors(name, kind)]
            assert found == [(spec.name, spec.dtype, spec.shape) for spec in specs]
    caches = {spec.name for spec in graphs["decoder"].outputs if spec.name.startswith("present.")}
    assert set(manifest.aliases) == caches
    assert len(caches) == 24
    assert manifest.aliases["present.2.visual_value_params"] == "past.2.visual_value_params"


def test_the_same_inputs_are_not_built_again(engines: tuple[Path, EngineManifest], plugin_file: Path) -> None:
    bundle, manifest = engines
    again = build(bundle, plugin_file)
    assert not again.built
    assert again.manifest == manifest


class Asked(Exception):
    """TensorRT was about to be asked for engines."""


@pytest.fixture
def built(engines: tuple[Path, EngineManifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with engines that may be changed; to build again raises Asked."""
    bundle = copy_bundle(engines[0], tmp_path / "bundle")
    shutil.copytree(engines[0] / "engines", bundle / "engines")

    def refuse(*arguments: object) -> None:
        raise Asked

    monkeypatch.setattr(engine_build, "_build", refuse)
    return bundle


def _shorten(directory: Path) -> None:
    (directory / "decoder.engine").write_bytes(b"engine")


def _remove(directory: Path) -> None:
    (directory / "vision.engine").unlink()


def _break_manifest(directory: Path) -> None:
    (directory / "engine.json").write_text("{")


def _change_bundle(directory: Path) -> None:
    path = directory.parent.parent / "vkvx.json"
    path.write_text(json.dumps(json.loads(path.read_text())))


@pytest.mark.parametrize("harm", [_shorten, _remove, _break_manifest, _change_bundle])
def test_damage_is_built_again(built: Path, plugin_file: Path, harm: Callable[[Path], None]) -> None:
    assert not build(built, plugin_file).built
    harm(built / "engines" / "rtx-8.9")
    with pytest.raises(Asked):
        build(built, plugin_file)


@pytest.mark.parametrize(
    "options",
    [
        {"force": True},
        {"limits": GivenLimits(batch_size=2, slots=3, text_tokens=301, visual_tokens=640)},
        {"compute_capabilities": ("8.6",)},
        {"workspace": 1 << 28},
        {"weight_streaming": True},
    ],
)
def test_other_options_are_built_again(built: Path, plugin_file: Path, options: dict[str, Any]) -> None:
    with pytest.raises(Asked):
        build(built, plugin_file, **options)


def test_without_the_plugin_is_built_again(built: Path) -> None:
    with pytest.raises(Asked):
        build(built, None)


def test_another_plugin_is_built_again(built: Path, tmp_path: Path, plugin_file: Path) -> None:
    other = tmp_path / plugin_file.name
    other.write_bytes(plugin_file.read_bytes() + b"\0")
    with pytest.raises(Asked):
        build(built, other)


def test_two_builds_at_once(bundle: Path, plugin_file: Path) -> None:
    (bundle / "engines").mkdir()
    with FileLock(bundle / "engines" / ".rtx-8.9.lock"), pytest.raises(EngineError, match="another build"):
        build(bundle, plugin_file)


def test_too_little_memory(bundle: Path, plugin_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_build, "available_memory", lambda: 300 << 20)
    with pytest.raises(BuildError, match=r"about 0\.4 GiB of main memory, 0\.3 GiB are free"):
        build(bundle, plugin_file)
    assert engine_directories(bundle) == []


def test_what_is_no_plugin(bundle: Path, tmp_path: Path, plugin_file: Path) -> None:
    text = tmp_path / "plugin.so"
    text.write_text("no library")
    foreign = Path(np.__file__).parent / "_core"
    (shared,) = sorted(foreign.glob("_multiarray_umath*.so"))
    for path in (text, shared):
        with pytest.raises(DependencyError, match="vkvx plugin build"):
            build(bundle, path)
    with pytest.raises(DependencyError, match="is no file"):
        build(bundle, tmp_path / "missing.so")
    assert engine_directories(bundle) == []
    assert build(bundle, plugin_file).built  # a failure leaves nothing behind in TensorRT either


def test_no_plugin_and_no_headers_to_compile_one(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin_build.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(plugin_build.OVERRIDES[PLUGIN_LIBRARIES[3]], raising=False)
    monkeypatch.setattr(plugin_build, "find_headers", lambda: None)
    with pytest.raises(DependencyError, match=r"vkvx plugin build --arch 89 --tensorrt-headers DIR"):
        build(bundle, None, plugin_free=False)


def test_a_missing_plugin_is_compiled_for_what_is_asked(
    bundle: Path, tmp_path: Path, plugin_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(plugin_build.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(plugin_build.OVERRIDES[PLUGIN_LIBRARIES[3]], raising=False)
    monkeypatch.setattr(plugin_build, "find_headers", lambda: tmp_path)
    monkeypatch.setattr(plugin_build, "plugin_of", lambda headers: PLUGIN_LIBRARIES[3])
    compiled = []

    def compile_plugin(architectures: str, headers: Path) -> Path:
        compiled.append(architectures)
        return plugin_file

    monkeypatch.setattr(plugin_build, "build_plugin", compile_plugin)
    monkeypatch.setattr(engine_build, "_build", lambda *arguments: (_ for _ in ()).throw(Asked()))
    with pytest.raises(Asked):
        build(bundle, None, plugin_free=False, compute_capabilities=("12.0", "8.6"))
    assert compiled == ["86,120"]


def test_an_embedded_plugin(bundle: Path, plugin_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin_build.OVERRIDES[PLUGIN_LIBRARIES[3]], str(plugin_file))
    manifest = build(bundle, EMBED).manifest
    assert sorted(manifest.files) == ["decoder.engine", "vision.engine"]
    assert manifest.plugin is not None
    assert manifest.plugin.embedded
    assert manifest.files["decoder.engine"].bytes > plugin_file.stat().st_size


def test_a_killed_build_leaves_nothing(bundle: Path, plugin_file: Path) -> None:
    command = [sys.executable, "-m", "vkvx", "build", str(bundle), "--compute-capability", "8.9"]
    process = subprocess.Popen([*command, "--plugin", str(plugin_file)], stderr=subprocess.DEVNULL)
    folder = bundle / "engines"
    deadline = time.monotonic() + 120
    while not list(folder.glob(".rtx-8.9.*.partial/decoder.engine")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert engine_directories(bundle) == []
    assert len(list(folder.glob(".rtx-8.9.*.partial"))) == 1
    assert build(bundle, plugin_file).built
    assert sorted(path.name for path in folder.iterdir()) in (["rtx-8.9"], [".rtx-8.9.lock", "rtx-8.9"])


def test_without_a_plugin(bundle_factory: Callable[..., Path], tmp_path: Path) -> None:
    bundle = copy_bundle(bundle_factory(bits=16), tmp_path / "bundle")
    manifest = build(bundle, None).manifest
    assert manifest.plugin is None
    assert manifest.engines["decoder"].plugin_layers == 0
    assert not manifest.empty_visual_index
    assert not manifest.profile("decoder", "decode").takes("visual_index", (1, 0))
    assert sorted(manifest.files) == ["decoder.engine", "vision.engine"]


def test_the_packed_decoder_parses_without_a_plugin(tiny_bundle: Path, library: TensorRTLibrary) -> None:
    path = tiny_bundle / "decoder.onnx"
    log = Log(library.module)
    graph = legalise(path, library.dialect, plugin_free=True)
    network = parse(library, library.module.Builder(log.logger), log, graph, path)
    assert network.plugin_layers == 0
    assert network.layers > 5000
    inputs = [network.definition.get_input(i) for i in range(network.definition.num_inputs)]
    assert not any(tensor.is_shape_tensor for tensor in inputs)


def parse_text(library: TensorRTLibrary, tmp_path: Path, body: str) -> None:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18, "vkvx" : 1]> {body}')
    log = Log(library.module)
    parse(library, library.module.Builder(log.logger), log, model.SerializeToString(), tmp_path / "decoder.onnx")


def test_parser_errors_name_the_node(library: TensorRTLibrary, tmp_path: Path) -> None:
    body = "agraph (float[n, 3] x) => (float[n, 3] y) { [odd] y = Det(x) }"
    with pytest.raises(
        BuildError, match=r"does not take node odd \(Det\) of decoder\.onnx: .*; export the model again"
    ):
        parse_text(library, tmp_path, body)
    body = "agraph (float[n, 3] x) => (float[n, 3] y) { [attend] y = vkvx.VisualKVAttention(x) }"
    with pytest.raises(BuildError, match=r"attend \(VisualKVAttention\).*vkvx plugin build"):
        parse_text(library, tmp_path, body)


def test_a_missing_file_of_weights(bundle: Path, plugin_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_build.Manifest, "load", _load_without_checks)
    (bundle / "model.safetensors").unlink()
    with pytest.raises(BuildError, match="copy the bundle again"):
        build(bundle, plugin_file)


def _load_without_checks(bundle: Path) -> Manifest:
    return Manifest.from_json(json.loads((Path(bundle) / "vkvx.json").read_text()))


def test_a_capability_that_rtx_does_not_know(bundle: Path, plugin_file: Path) -> None:
    with pytest.raises(OptionError, match="--backend tensorrt"):
        build(bundle, plugin_file, compute_capabilities=("9.0",))
