"""Limits, profiles, what each TensorRT refuses, progress, memory: nothing here builds an engine."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from doubles import Logger, Severity

from vkvx.errors import CapacityError, DependencyError, OptionError, StorageError
from vkvx.manifest import Manifest
from vkvx.runtime.engines import build as engine_build
from vkvx.runtime.engines.library import TensorRTLibrary, load
from vkvx.runtime.engines.limits import GIB, GivenLimits, build_profiles, resolve_limits, slot_bytes
from vkvx.runtime.engines.log import Log
from vkvx.runtime.engines.memory import available_memory, peak_memory
from vkvx.runtime.engines.network import _set_precisions, _value_types
from vkvx.runtime.engines.options import EMBED, BuildOptions, check_options, choose_capabilities, configure
from vkvx.runtime.engines.progress import BuildProgress, monitor, run_cancellable

NEW_FLAGS = ("VERSION_COMPATIBLE", "WEIGHT_STREAMING", "STRIP_PLAN", "REFIT_IDENTICAL")


def module(version: str, flags: tuple[str, ...] = NEW_FLAGS, **names: Any) -> TensorRTLibrary:
    """A TensorRT of which only the names are there that say what it offers."""
    recent = int(version.split(".")[0]) >= 10
    contents = {
        "BuilderFlag": SimpleNamespace(**dict.fromkeys(flags, 1)),
        "PreviewFeature": SimpleNamespace(**({"ALIASED_PLUGIN_IO_10_03": 1} if recent else {})),
        "NetworkDefinitionCreationFlag": SimpleNamespace(
            **({"STRONGLY_TYPED": 1} if recent else {"EXPLICIT_BATCH": 0})
        ),
        "IBuilderConfig": SimpleNamespace(plugins_to_serialize=None),
        "HardwareCompatibilityLevel": SimpleNamespace(AMPERE_PLUS=1),
        "Builder": SimpleNamespace(),
        **names,
    }
    return TensorRTLibrary("tensorrt", SimpleNamespace(**contents), version)


OLD = module("8.6.0", ("VERSION_COMPATIBLE",))
NEW = module("10.9.0.34")
RTX = load("rtx", has_gpu=False)


def test_what_versions_take() -> None:
    assert (OLD.plugin_interface, NEW.plugin_interface, RTX.plugin_interface) == (2, 3, 3)
    assert (OLD.dialect.opset, NEW.dialect.opset, RTX.dialect.opset) == (17, None, None)
    assert not OLD.dialect.bfloat16
    assert not OLD.takes_empty_tensors
    assert not OLD.is_strongly_typed
    assert NEW.takes_empty_tensors
    assert RTX.writes_streams
    assert (OLD.needs_gpu, RTX.needs_gpu) == (True, False)


@pytest.mark.parametrize(
    ("library", "options", "words"),
    [
        (RTX, {"timing_cache": Path("x")}, "--timing-cache: it times nothing"),
        (RTX, {"hardware_compatible": True}, "several --compute-capability"),
        (RTX, {"optimization_level": 3}, "--optimization-level: it has but one"),
        (RTX, {"version_compatible": True}, "no lean runtime|without a lean runtime"),
        (RTX, {"strip_plan": True}, "with a GPU"),
        (OLD, {"weight_streaming": True}, "offers no --weight-streaming"),
        (OLD, {"strip_plan": True}, "offers no --strip-plan"),
        (module("8.6.0", IBuilderConfig=SimpleNamespace()), {"plugin": EMBED}, "cannot embed"),
        (NEW, {"strip_plan": True, "weight_streaming": True}, "no weights to stream"),
        (NEW, {"optimization_level": 6}, "0 to 5"),
        (NEW, {"workspace": 0}, "--workspace must be"),
        (NEW, {"plugin": "x.so", "plugin_free": True}, "leave out --plugin or"),
    ],
)
def test_refusals(library: TensorRTLibrary, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        check_options(library, BuildOptions(**options), has_gpu=False)


@pytest.mark.parametrize(
    ("library", "options"),
    [
        (RTX, {"weight_streaming": True, "plugin": EMBED, "workspace": 1 << 30}),
        (OLD, {"version_compatible": True, "hardware_compatible": True, "optimization_level": 0}),
        (NEW, {"strip_plan": True, "timing_cache": Path("x")}),
    ],
)
def test_what_is_offered(library: TensorRTLibrary, options: dict[str, Any]) -> None:
    check_options(library, BuildOptions(**options), has_gpu=False)


@pytest.mark.parametrize(
    ("library", "given", "native", "expected"),
    [
        (RTX, ("8.9",), [], ("8.9",)),
        (RTX, ("12.0", "8.6", "12.0"), ["9.0"], ("8.6", "12.0")),
        (RTX, (), ["8.9"], ("8.9",)),
        (NEW, (), ["9.0"], ("9.0",)),
        (NEW, ("9.0",), ["8.0", "9.0"], ("9.0",)),
    ],
)
def test_capabilities(
    library: TensorRTLibrary, given: tuple[str, ...], native: list[str], expected: tuple[str, ...]
) -> None:
    assert choose_capabilities(library, given, native) == expected


@pytest.mark.parametrize(
    ("library", "given", "native", "error", "words"),
    [
        (RTX, (), [], OptionError, "give --compute-capability"),
        (RTX, ("89",), [], OptionError, "such as 8.9"),
        (RTX, ("9.0",), [], OptionError, "need --backend tensorrt"),
        (RTX, (), ["9.0"], OptionError, "need --backend tensorrt"),
        (NEW, ("8.9",), [], DependencyError, "--backend rtx"),
        (NEW, ("8.9",), ["9.0"], OptionError, "not for 8.9"),
        (NEW, ("8.9", "9.0"), ["9.0"], OptionError, "--backend rtx"),
    ],
)
def test_capabilities_that_cannot_be(
    library: TensorRTLibrary, given: tuple[str, ...], native: list[str], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        choose_capabilities(library, given, native)


def test_backends() -> None:
    assert load("auto", has_gpu=False).backend == "rtx"
    with pytest.raises(OptionError, match="unknown backend"):
        load("vulkan", has_gpu=False)


def test_a_backend_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from vkvx.runtime.engines import library as tensorrt_library

    monkeypatch.setitem(tensorrt_library.MODULES, "tensorrt", "vkvx_no_such_module")
    with pytest.raises(DependencyError, match="pip install tensorrt"):
        load("tensorrt", has_gpu=True)
    monkeypatch.setitem(tensorrt_library.MODULES, "rtx", "vkvx_no_such_module")
    with pytest.raises(DependencyError, match="tensorrt-rtx-cu13"):
        load("auto", has_gpu=False)


@pytest.mark.parametrize(("version", "taken"), [("8.5.3", False), ("8.6.0", True), ("10.2.0", False), ("10.3.0", True)])
def test_versions_with_an_interface_for_the_plugin(monkeypatch: pytest.MonkeyPatch, version: str, taken: bool) -> None:
    from vkvx.runtime.engines import library as tensorrt_library

    monkeypatch.setitem(tensorrt_library.MODULES, "tensorrt", "vkvx_tensorrt_stand_in")
    monkeypatch.setitem(sys.modules, "vkvx_tensorrt_stand_in", SimpleNamespace(__version__=version))
    if taken:
        assert load("tensorrt", has_gpu=True).version == version
    else:
        with pytest.raises(DependencyError, match=r"8\.6, or 10\.3 or newer"):
            load("tensorrt", has_gpu=True)


def test_weakly_typed_networks_prefer_the_types_of_the_graph() -> None:
    class Config:
        def __init__(self) -> None:
            self.flags: list[str] = []
            self.sources: int | None = None
            self.features: list[tuple[str, bool]] = []

        def set_flag(self, flag: str) -> None:
            self.flags.append(flag)

        def set_preview_feature(self, feature: str, on: bool) -> None:
            self.features.append((feature, on))

        def set_tactic_sources(self, sources: int) -> None:
            self.sources = sources

    flags = SimpleNamespace(FP16="fp16", PREFER_PRECISION_CONSTRAINTS="prefer", VERSION_COMPATIBLE="version")
    features = SimpleNamespace(PROFILE_SHARING_0806="sharing", FASTER_DYNAMIC_SHAPES_0805="faster")
    old = module("8.6.0", (), BuilderFlag=flags, PreviewFeature=features)
    builder = SimpleNamespace(create_builder_config=Config)
    config = configure(old, builder, BuildOptions(version_compatible=True), ("9.0",))
    assert (config.flags, config.sources) == (["version", "fp16", "prefer"], 0)
    assert config.features == [("sharing", True), ("faster", False)]
    assert config.builder_optimization_level == 0
    config = configure(old, builder, BuildOptions(optimization_level=4), ("9.0",))
    assert config.builder_optimization_level == 4


def test_types_of_an_old_network_are_those_of_the_graph() -> None:
    """The parser of TensorRT 8.6 takes all but inputs and outputs for FP32."""
    text = """<ir_version: 10, opset_import: ["" : 17]> agraph (float16[n] x, int32[n] i) => (float16[n] y)
      <float16[3] w = {1, 2, 3}> {
      wide = Cast <to = 1> (x)
      square = Mul(wide, wide)
      narrow = Cast <to = 10> (square)
      j = Add(i, i)
      y = Mul(narrow, w)
    }"""
    types = _value_types(onnx.parser.parse_model(text).SerializeToString())
    assert types == {"x": "float16", "wide": "float32", "square": "float32", "narrow": "float16", "y": "float16"}

    class Layer:
        num_outputs = 1
        precision: str | None = None

        def __init__(self, kind: str, result: str) -> None:
            self.type, self.result, self.outputs = kind, result, {}

        def get_output(self, index: int) -> Any:
            return SimpleNamespace(name=self.result)

        def set_output_type(self, index: int, dtype: str) -> None:
            self.outputs[index] = dtype

    kinds = ("CONSTANT", "SHAPE", "CAST", "ELEMENTWISE", "SHUFFLE", "PLUGIN_V2")
    old = module(
        "8.6.0",
        DataType=SimpleNamespace(HALF="half", FLOAT="float"),
        LayerType=SimpleNamespace(**{kind: kind for kind in kinds}),
    )
    layers = {
        "square": Layer("ELEMENTWISE", "square"),
        "narrow": Layer("CAST", "narrow"),
        "j": Layer("ELEMENTWISE", "j"),
        "added": Layer("SHUFFLE", "(Unnamed Layer* 3) [Shuffle]_output"),
        "y": Layer("PLUGIN_V2", "y"),
    }
    _set_precisions(old, layers.values(), types)
    assert {name: layer.precision for name, layer in layers.items() if layer.precision} == {
        "square": "float",
        "y": "half",
    }
    assert {name: layer.outputs for name, layer in layers.items() if layer.outputs} == {
        "square": {0: "float"},
        "y": {0: "half"},
    }


def test_the_library_of_rtx_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vkvx.runtime.engines import library as tensorrt_library

    (tmp_path / "libtensorrt_rtx.so.1").touch()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(tensorrt_library.util, "find_spec", lambda name: spec)
    tensorrt_library._name_rtx_library()
    tensorrt_library._name_rtx_library()
    assert (tmp_path / "libtensorrt_rtx.so").resolve() == tmp_path / "libtensorrt_rtx.so.1"


def test_messages_about_the_missing_gpu_are_no_reason() -> None:
    noise = "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (driver version is insufficient)"
    log = Log(SimpleNamespace(ILogger=Logger))
    assert log.reason == "it does not say why"
    for message in (noise, "what\nis wrong", "and more"):
        log.logger.log(Severity.WARNING, "no error")
        log.logger.log(Severity.ERROR, message)
    assert log.reason == "what is wrong"
    log.errors[:] = [noise]
    assert log.reason == noise


# --- limits and profiles ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    return Manifest.load(tiny_bundle)


def test_default_limits(manifest: Manifest) -> None:
    limits = resolve_limits(manifest, GivenLimits(), 10 << 20)
    assert (limits.batch_size, limits.slots, limits.input_len) == (4, 16, 1024)
    assert (limits.visual_tokens, limits.text_tokens, limits.pictures) == (4 * 640, 2048, 2)


def test_slots_follow_the_memory(manifest: Manifest) -> None:
    slot = slot_bytes(manifest, 2560, 2048)
    room = int(5 * slot / 0.75)
    assert resolve_limits(manifest, GivenLimits(memory=room), 0).slots == 4
    assert resolve_limits(manifest, GivenLimits(), 0, gpu_memory=room).slots == 4
    with pytest.raises(CapacityError, match="--memory"):
        resolve_limits(manifest, GivenLimits(memory=room, slots=6), 0)
    with pytest.raises(CapacityError, match="--max-visual-tokens"):
        resolve_limits(manifest, GivenLimits(memory=1 << 20), 0)


def test_given_limits(manifest: Manifest) -> None:
    limits = resolve_limits(manifest, GivenLimits(batch_size=8, visual_tokens=641, text_tokens=99, input_len=640), 0)
    assert (limits.batch_size, limits.slots) == (8, 8)
    assert (limits.visual_tokens, limits.text_tokens) == (1280, 99)
    assert resolve_limits(manifest, GivenLimits(slots=2), 0).batch_size == 2


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"visual_tokens": 0}, CapacityError, "at least 640"),
        ({"input_len": 500}, CapacityError, "at least 576"),
        ({"input_len": 5000}, OptionError, "4096 positions"),
        ({"batch_size": 4, "slots": 2}, OptionError, "more than --max-slots 2"),
        ({"slots": 0}, OptionError, "--max-slots must be at least 1"),
        ({"text_tokens": -1}, OptionError, "--max-text-tokens must be"),
        ({"memory": 0}, OptionError, "--memory must be"),
    ],
)
def test_limits_that_cannot_be(manifest: Manifest, given: dict[str, int], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        resolve_limits(manifest, GivenLimits(**given), GIB)


def with_pictures(manifest: Manifest, tile: int, typical: tuple[int, ...]) -> Manifest:
    """The manifest with tiles of so many tokens, and usual pictures of these."""
    vision = manifest.graphs["vision"]
    outputs = tuple(replace(tensor, shape=(f"{tile}*P", *tensor.shape[1:])) for tensor in vision.outputs)
    graphs = {**manifest.graphs, "vision": replace(vision, outputs=outputs)}
    return replace(manifest, model=replace(manifest.model, typical_tokens=typical), graphs=graphs)


def test_pictures_of_several_groups_and_of_any_size(manifest: Manifest) -> None:
    large = with_pictures(manifest, 1500, (1500,))
    limits = resolve_limits(large, GivenLimits(), 0)
    assert (limits.visual_tokens, limits.input_len, limits.pictures) == (2 * 3 * 640, 1948, 2)
    most = build_profiles(large, limits, empty_indices=True)[0].shapes["visual_index"][2]
    assert most == (4, 6 * 640)
    tiles = with_pictures(manifest, 256, (1792, 3328))
    limits = resolve_limits(tiles, GivenLimits(), 0)
    assert (limits.visual_tokens, limits.input_len) == (1 * 6 * 640, 3776)
    profiles = build_profiles(tiles, limits, empty_indices=True)
    assert profiles[0].shapes["visual_index"][1:] == ((1, 6 * 640), (4, 6 * 640))
    assert profiles[-1].shapes["pixel_values"][2][0] == limits.pictures == 6  # tiles in a call
    prompt = resolve_limits(tiles, GivenLimits(input_len=600), 0)  # two small pictures and a beginning of a third
    assert build_profiles(tiles, prompt, empty_indices=True)[0].shapes["visual_index"][2] == (4, 3 * 640)


@pytest.mark.parametrize("empty", [True, False])
def test_profiles_without_empty_sizes(manifest: Manifest, empty: bool) -> None:
    limits = resolve_limits(manifest, GivenLimits(), 0)
    for profile in build_profiles(manifest, limits, empty_indices=empty):
        sizes = {size for shapes in profile.shapes.values() for shape in shapes for size in shape}
        assert (0 in sizes) is (empty and profile.engine == "decoder")
        for least, best, most in profile.shapes.values():
            assert all(a <= b <= c for a, b, c in zip(least, best, most, strict=True))


# --- progress, memory ------------------------------------------------------------------------------------------------


def test_progress_of_nested_phases() -> None:
    seen: list[int] = []
    progress = BuildProgress("decoder engine", lambda stage, done, total: seen.append(done))
    progress.start("build", None, 2)
    progress.start("tactics", "build", 4)
    assert progress.step("tactics", 0)
    assert progress.fraction() == pytest.approx(0.125)
    assert progress.step("tactics", 3)
    progress.finish("tactics")
    assert progress.step("build", 0)
    assert progress.fraction() == pytest.approx(0.5)
    progress.start("again", "build", 10)
    progress.done()
    assert seen == sorted(seen)
    assert seen[-1] == 1000
    progress.cancelled = True
    assert not progress.step("build", 1)


def test_no_monitor_before_tensorrt_10() -> None:
    progress = BuildProgress("x", lambda *a: None)
    assert monitor(OLD.module, progress) is None
    watch = monitor(RTX.module, progress)
    watch.phase_start("build", None, 4)
    assert watch.step_complete("build", 1)
    assert progress.fraction() == pytest.approx(0.5)
    watch.phase_finish("build")


def test_an_interrupt_cancels_and_waits(request: pytest.FixtureRequest) -> None:
    # A process that a shell has put into the background ignores Ctrl-C, and so would this test.
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = threading.Event()
    ended = []

    def work() -> None:
        assert stop.wait(30)
        time.sleep(0.2)
        ended.append(True)

    timer = threading.Timer(0.3, lambda: __import__("_thread").interrupt_main())
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run_cancellable(work, stop.set)
    assert ended


def test_results_and_errors_of_the_work() -> None:
    assert run_cancellable(lambda: 7, lambda: None) == 7

    def fail() -> None:
        raise ValueError("in the thread")

    with pytest.raises(ValueError, match="in the thread"):
        run_cancellable(fail, lambda: None)


def test_memory(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   5000 kB\n")
    none = tmp_path / "none"
    assert available_memory(tmp_path, none) == 5000 * 1024
    assert available_memory(none, none) is None
    group = tmp_path / "group"
    group.mkdir()
    (group / "memory.max").write_text("3000000\n")
    (group / "memory.current").write_text("1000000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 300000\nactive_file 200000\n")
    assert available_memory(tmp_path, group) == 2_500_000
    (group / "memory.max").write_text("max\n")
    assert available_memory(tmp_path, group) == 5000 * 1024
    assert (peak_memory() or 0) > 10 << 20
    assert peak_memory(none) is None


def test_a_timing_cache_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / "cache"
    path.write_bytes(b"old")
    job = SimpleNamespace(options=SimpleNamespace(timing_cache=path))
    config = SimpleNamespace(get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"new"))
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StorageError, match="cannot write"):
        engine_build._save_timing_cache(job, config)  # type: ignore[arg-type]
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"old"]
    monkeypatch.undo()
    engine_build._save_timing_cache(job, config)  # type: ignore[arg-type]
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"new"]
