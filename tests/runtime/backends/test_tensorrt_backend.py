"""The TensorRT backend on a stand-in for GPU and TensorRT, against onnxruntime; and everything it refuses."""

from __future__ import annotations

import gc
import hashlib
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles import Cuda, TensorRT, install_tensorrt, make_engines

from vkvx.errors import BundleError, CapacityError, DependencyError, DeviceError, EngineError, OptionError, VkvxError
from vkvx.manifest import Manifest
from vkvx.models.registry import sample_pages
from vkvx.runtime.backends import golden
from vkvx.runtime.backends.registry import choose_backend, open_backend
from vkvx.runtime.backends.tensorrt.backend import TensorRTBackend
from vkvx.runtime.calls import Row, build_call
from vkvx.runtime.checks.comparison import TOLERANCES
from vkvx.runtime.checks.validate import validate_bundle
from vkvx.runtime.engines.manifest import FILE_NAME, Limits
from vkvx.runtime.sessions.session import Session

LIMITS = Limits(batch_size=3, slots=4, input_len=1400, visual_tokens=1920, text_tokens=200, pictures=1)
PAGES = sample_pages()
QUESTIONS: list[tuple[str, list[Path]]] = [
    ("How much is 2 plus 3?", []),
    ("Transcribe the page.", PAGES[:1]),
    ("What is at row 2 column 3 of the first page?", PAGES[1:3]),
    ("Read row 1 of the page.", PAGES[3:4]),
    ("Transcribe the page.", PAGES[2:3]),
]


def load(bundle: Path, backend: str, **options: Any) -> Session:
    return Session.load(bundle, backend=backend, verify=False, **{"slots": 4, "text_tokens": 160, **options})


def answers(session: Session, count: int = 5, **options: Any) -> list[tuple[int, ...]]:
    prompts = [
        session.format([{"role": "user", "content": [{"type": "image"}] * len(p) + [{"type": "text", "text": q}]}])
        for q, p in QUESTIONS[:count]
    ]
    found = session.generate(prompts, [pictures for _, pictures in QUESTIONS[:count]], ignore_eos=True, **options)
    return [one.token_ids for one in found]


@pytest.fixture(scope="module")
def expected(bundle_factory: Any) -> dict[int, list[tuple[int, ...]]]:
    """What onnxruntime answers, by bits."""
    found = {}
    for bits in (1, 16):
        with load(bundle_factory(bits=bits), "onnxruntime") as session:
            found[bits] = answers(session, max_new_tokens=8)
    return found


@pytest.mark.parametrize(
    ("bits", "version", "empty"), [(1, "10.9.0.34", True), (1, "8.6.0", False), (16, "10.9.0.34", True)]
)
def test_requests_come_and_go_and_get_what_onnxruntime_gives(
    bits: int,
    version: str,
    empty: bool,
    bundle_factory: Any,
    expected: dict[int, list[tuple[int, ...]]],
    own_copy: Any,
    monkeypatch: pytest.MonkeyPatch,
    cuda: Cuda,
) -> None:
    install_tensorrt(monkeypatch, cuda, version)
    bundle = own_copy(bundle_factory(bits=bits))
    limits = LIMITS if bits == 1 else Limits(3, 4, 1400, 0, 2500, 1)
    make_engines(bundle, limits, version=version, empty_visual_index=empty)
    with load(bundle, "tensorrt", slots=3) as session:
        backend: Any = session.backend
        places = backend.addresses
        # Five prompts in three slots: rows of a step change as they come and go.
        assert answers(session, max_new_tokens=8) == expected[bits]
        assert backend.addresses == places
        assert all(places[present] == places[past] for present, past in backend.engines.manifest.aliases.items())
        assert set(backend.graphs) == {1, 2, 3} & set(backend.graphs)
        assert 3 in backend.graphs
        assert cuda.launched > 5


@pytest.fixture
def bundle(own_bundle: Path) -> Path:
    make_engines(own_bundle, LIMITS)
    return own_bundle


def open_engines(bundle: Path, **options: Any) -> Any:
    manifest = Manifest.load(bundle)
    capacity = {"slots": 2, "visual_tokens": 1280, "text_tokens": 64}
    return open_backend("tensorrt", bundle, manifest, **{"verify": False, **capacity, **options})


@pytest.mark.usefixtures("tensorrt")
def test_turns_forks_and_reused_slots(bundle: Path) -> None:
    """The counts on the device follow what the host does to slots between calls."""
    found = []
    for backend in ("onnxruntime", "tensorrt"):
        with load(bundle, backend, slots=3) as session:
            first = session.conversation()
            said = ["".join(first.ask("Transcribe the page.", PAGES[:1], max_new_tokens=6))]
            twin = first.fork()
            said.append("".join(first.ask("Read row 1 of the second page.", PAGES[1:2], max_new_tokens=6)))
            said.append("".join(twin.ask("Read row 2 of the page.", max_new_tokens=6)))
            slot = first.slot
            first.close()
            again = session.conversation()
            assert again.slot == slot
            said.append("".join(again.ask("Transcribe the page.", PAGES[2:3], max_new_tokens=6)))
            said.append("".join(twin.ask("And row 3?", max_new_tokens=6)))
            found.append(said)
    assert found[0] == found[1]


@pytest.mark.usefixtures("tensorrt")
def test_a_prefill_touches_only_its_own_slots(bundle: Path) -> None:
    backend = open_engines(bundle, slots=4)
    golden.run(backend, 2)
    before = {name: backend.cache.read(name) for name in backend.cache.buffers}
    golden.run(backend, 0)
    for name, contents in before.items():
        np.testing.assert_array_equal(backend.cache.read(name, 2).view(np.uint8), contents[2].view(np.uint8))
        np.testing.assert_array_equal(backend.cache.read(name)[1:].view(np.uint8), contents[1:].view(np.uint8))
    assert backend.cache.group_count(0) == backend.cache.group_count(2) == 1


def test_a_step_waits_once_and_is_captured_the_second_time(bundle: Path, cuda: Cuda, tensorrt: TensorRT) -> None:
    backend = open_engines(bundle)
    golden.run(backend, 0)  # a prefill and three decode steps: plain, captured, replayed
    assert list(backend.logits_graphs) == [1]
    assert cuda.launched == 2
    row = Row(0, np.array([9], np.int32), (), backend.cache.length(0))
    call = build_call([row], group_size=640, image_token_id=3)
    waits, launches, allocations = cuda.synchronized, cuda.launched, len(cuda.starts)
    backend.step(call, None)
    assert (cuda.synchronized - waits, cuda.launched - launches) == (1, 1)
    assert len(cuda.starts) == allocations, "a decode step allocates nothing"
    assert len(tensorrt.plugins) == 1


@pytest.mark.usefixtures("tensorrt")
def test_the_counts_survive_a_step_that_fails(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, twin = open_engines(bundle), open_engines(bundle)
    call = build_call([Row(1, np.array([9, 8, 7], np.int32))], group_size=640, image_token_id=3)
    expected = twin.step(call, None)
    synchronize = backend.gpu.synchronize

    def fail() -> None:
        monkeypatch.setattr(backend.gpu, "synchronize", synchronize)
        raise DeviceError("the GPU has fallen off the bus")

    backend.step(build_call([Row(0, np.array([9], np.int32))], group_size=640, image_token_id=3), None)
    monkeypatch.setattr(backend.gpu, "synchronize", fail)
    with pytest.raises(DeviceError):
        backend.step(call, None)  # ran on the device, whose counts are ahead now
    assert backend.cache.text_count.tolist() == [1, 0]
    np.testing.assert_array_equal(backend.step(call, None), expected)
    assert backend.cache.text_count.tolist() == [1, 3]


def test_memory_goes_back_with_the_backend(bundle: Path, cuda: Cuda, tensorrt: TensorRT) -> None:
    before = len(cuda.blocks)
    backend = open_engines(bundle)
    golden.run(backend, 0)
    assert len(cuda.blocks) > before + 20
    order: list[str] = []
    weakref.finalize(backend.logits_graphs[1], order.append, "graph")
    weakref.finalize(backend._decode[1]._context, order.append, "context")
    weakref.finalize(backend.cache.buffers["0.text_key"], order.append, "cache")
    weakref.finalize(backend.engines.decoder, order.append, "engine")
    backend.close()
    backend.close()
    assert order == ["graph", "context", "cache", "engine"]
    assert len(cuda.blocks) == before + 1  # what empty arrays point to
    del backend
    gc.collect()
    assert len(cuda.blocks) == before


def choose(bundle: Path, provider: str = "auto") -> tuple[str, str]:
    found = choose_backend("auto", bundle, Manifest.load(bundle), provider)
    return found.name, found.reason


@pytest.mark.usefixtures("tensorrt")
def test_auto_takes_engines_and_says_so(bundle: Path) -> None:
    assert choose(bundle) == ("tensorrt", "the bundle has engines for Stand-in (GPU 0)")
    assert choose(bundle, "cpu") == ("onnxruntime", "the CPU was asked for")
    with Session.load(bundle, slots=1, verify=False) as session:
        assert session.backend.name == "tensorrt"
        # What was not given is at most what the engines take.
        assert (session.backend.cache.visual_capacity, session.backend.cache.text_capacity) == (1920, 200)


def test_auto_says_why_it_does_not_take_engines(bundle: Path, cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    name, reason = choose(bundle)
    assert name == "onnxruntime"
    assert "its engines need the Python module tensorrt" in reason
    cuda.capabilities = ["8.9"]
    assert "tensorrt-9.0 is for compute capability 9.0, the machine has 8.9" in choose(bundle)[1]
    cuda.capabilities = []
    assert "no NVIDIA GPU can be used" in choose(bundle)[1]
    for directory in (bundle / "engines").iterdir():
        (directory / FILE_NAME).unlink()
    assert "engine" not in choose(bundle)[1]


def refused(kind: type[VkvxError], bundle: Path, **options: Any) -> str:
    with pytest.raises(kind) as error:
        open_engines(bundle, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.usefixtures("tensorrt")
class TestRefusals:
    def test_no_gpu(self, bundle: Path, cuda: Cuda) -> None:
        cuda.capabilities = []
        words = refused(DependencyError, bundle)
        assert "no CUDA-capable device is detected" in words
        assert "--backend onnxruntime" in words

    def test_no_cuda_python(self, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        assert "pip install 'cuda-python" in refused(DependencyError, bundle)

    def test_no_tensorrt(self, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        assert "pip install tensorrt" in refused(DependencyError, bundle)

    def test_another_compute_capability(self, bundle: Path, cuda: Cuda) -> None:
        cuda.capabilities = ["8.9"]
        words = refused(EngineError, bundle)
        assert "tensorrt-9.0 is for compute capability 9.0, the machine has 8.9" in words
        assert f"vkvx build {bundle} --backend tensorrt" in words

    def test_no_engines(self, own_bundle: Path) -> None:
        assert "has no engines of 'tensorrt'; run `vkvx build" in refused(EngineError, own_bundle)

    def test_another_version(self, bundle: Path, tensorrt: TensorRT) -> None:
        tensorrt.__version__ = "10.10.0.31"
        words = refused(EngineError, bundle)
        assert "built by TensorRT 10.9.0.34, this one is 10.10.0.31" in words
        assert "vkvx build" in words

    def test_another_bundle(self, bundle: Path) -> None:
        text = (bundle / "vkvx.json").read_text()
        (bundle / "vkvx.json").write_text(text + "\n")
        assert "another state of the bundle" in refused(EngineError, bundle)

    def test_another_plugin(self, bundle: Path) -> None:
        (bundle / "engines/tensorrt-9.0/libvkvx_tensorrt.so").write_bytes(b"b plugin")
        for verify in (False, True):
            assert "vkvx build BUNDLE --force" in refused(EngineError, bundle, verify=verify)

    def test_a_plugin_that_does_not_load(self, bundle: Path, tensorrt: TensorRT) -> None:
        tensorrt.refuses_plugin = "undefined symbol"
        assert "cannot load the plugin" in refused(EngineError, bundle)

    def test_another_plugin_in_the_same_process(self, bundle: Path, tensorrt: TensorRT) -> None:
        open_engines(bundle)
        assert len(tensorrt.plugins) == 1
        open_engines(bundle)
        assert len(tensorrt.plugins) == 1, "a registry takes a plugin once"
        directory = bundle / "engines/tensorrt-9.0"
        new = bundle / "new"
        directory.rename(new)
        make_engines(bundle, LIMITS)
        text = (directory / FILE_NAME).read_text()
        old, other = (hashlib.sha256(contents).hexdigest() for contents in (b"a plugin", b"b plugin"))
        (directory / FILE_NAME).write_text(text.replace(old, other))
        (directory / "libvkvx_tensorrt.so").write_bytes(b"b plugin")
        assert "process of their own" in refused(EngineError, bundle)

    def test_a_damaged_engine(self, bundle: Path) -> None:
        path = bundle / "engines/tensorrt-9.0/decoder.engine"
        contents = path.read_bytes()
        path.write_bytes(b"x" + contents[1:])
        assert "SHA-256 mismatch" in refused(EngineError, bundle, verify=True)
        words = refused(EngineError, bundle, verify=False)
        assert "magic tag does not match" in words
        assert "vkvx build BUNDLE --force" in words
        path.write_bytes(contents[:-1])
        words = refused(EngineError, bundle, verify=False)
        assert f"{path} has {len(contents) - 1} bytes, expected {len(contents)}; run `vkvx build {bundle}" in words

    def test_too_large_a_cache(self, bundle: Path) -> None:
        assert "--max-text-tokens 201" in refused(CapacityError, bundle, text_tokens=201)
        assert "--max-slots 5" in refused(CapacityError, bundle, slots=5)

    def test_too_little_memory(self, bundle: Path, cuda: Cuda) -> None:
        cuda.memory = 1 << 18
        words = refused(CapacityError, bundle)
        assert "memory of Stand-in (GPU 0) ran out" in words
        assert "--max-visual-tokens" in words

    def test_options_of_a_cpu(self, bundle: Path) -> None:
        assert "--provider cpu" in refused(OptionError, bundle, provider="cpu")
        assert "--threads" in refused(OptionError, bundle, threads=2)

    def test_a_prompt_that_the_engine_does_not_take(self, own_bundle: Path) -> None:
        make_engines(own_bundle, Limits(3, 4, 600, 1920, 200, 1))
        with load(own_bundle, "tensorrt", slots=1) as session:
            words = r"the engine takes 600 in a call; build it with .*--max-input-len"
            with pytest.raises(CapacityError, match=words):
                session.generate("<image><image> Transcribe.", PAGES[:2], max_new_tokens=2)

    def test_pictures_of_another_shape(self, bundle: Path) -> None:
        backend = open_engines(bundle)
        with pytest.raises(OptionError, match="takes \\['pixel_values'\\]"):
            backend.encode({"pixels": np.zeros((1, 3, 336, 336), np.float32)})
        with pytest.raises(CapacityError, match="the vision engine takes pixel_values"):
            backend.encode({"pixel_values": np.zeros((1, 3, 224, 224), np.float32)})
        call = build_call([Row(0, np.full(576, 3, np.int32), (576,))], group_size=640, image_token_id=3)
        with pytest.raises(OptionError, match="visual_embeds of shape"):
            backend.step(call, np.zeros((1, 576, 256), np.float16))


def record_sample(bundle: Path, directory: Path) -> Path:
    capacity = {"slots": 1, "visual_tokens": 640, "text_tokens": golden.TEXT_TOKENS}
    return golden.record(
        open_backend("onnxruntime", bundle, Manifest.load(bundle), provider="cpu", **capacity), directory
    )


@pytest.mark.usefixtures("tensorrt")
class TestGoldenSample:
    """That of the bundle, unless there is one beside the engines."""

    def test_a_right_engine_passes(self, bundle: Path) -> None:
        backend = open_engines(bundle, verify=True, slots=1)
        assert backend.golden.startswith("golden sample: logits within")
        assert backend.cache.free_slots == (0,)
        assert backend.cache.length(0) == 0

    def test_a_wrong_engine_is_refused(self, bundle: Path) -> None:
        path = record_sample(bundle, bundle / "engines/tensorrt-9.0")
        with np.load(path) as file:
            logits = file["logits"]
        wrong = logits.copy()
        wrong[2] = np.roll(wrong[2], 1)
        np.savez(path, logits=wrong)
        words = refused(EngineError, bundle, verify=True)
        assert "the decode of the golden sample" in words
        assert "vkvx build BUNDLE --force" in words
        assert open_engines(bundle, verify=False).golden == "not checked"
        wrong = logits.copy()
        wrong[0, 0] = np.nan
        np.savez(path, logits=wrong)
        assert "the prefill of the golden sample" in refused(EngineError, bundle, verify=True)
        np.savez(path, logits=logits[:, 1:])
        assert "this model gives (4, 406)" in refused(BundleError, bundle, verify=True)
        path.write_bytes(b"PK")
        assert "cannot be read" in refused(BundleError, bundle, verify=True)

    def test_it_is_told_when_nothing_was_checked(self, own_bundle: Path) -> None:
        manifest = Manifest.load(own_bundle)
        files = {name: info for name, info in manifest.files.items() if name != golden.FILE_NAME}
        replace(manifest, files=files).save(own_bundle)
        (own_bundle / golden.FILE_NAME).unlink()
        make_engines(own_bundle, LIMITS)
        assert "no golden sample" in open_engines(own_bundle, verify=True).golden
        record_sample(own_bundle, own_bundle)
        assert "too small" in open_engines(own_bundle, verify=True, text_tokens=4).golden


@pytest.mark.usefixtures("tensorrt")
class TestValidate:
    """``vkvx validate --backend tensorrt``."""

    def test_engines_are_compared_with_onnxruntime(self, bundle: Path) -> None:
        report = validate_bundle(bundle, backend="tensorrt", steps=2)
        assert report.passed
        assert (report.backend, report.model, report.provider) == ("tensorrt", "onnxruntime", "cuda")
        names = {(check.phase, check.name) for check in report.checks}
        assert {("vision", "image_embeds"), ("turn 2 prefill", "visual_codes"), ("turn 2 decode 2", "logits")} <= names
        assert report.to_json()["backend"] == "tensorrt"

    def test_a_wrong_engine_fails(self, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An engine that writes no text into its cache."""
        step = TensorRTBackend.step

        def forget(self: Any, call: Any, embeds: Any) -> np.ndarray:
            logits = step(self, call, embeds)
            self.gpu.clear(self.cache.buffers["1.text_key"])
            return logits

        monkeypatch.setattr(TensorRTBackend, "step", forget)
        monkeypatch.setattr(golden, "check", lambda *_: "not checked")
        report = validate_bundle(bundle, backend="tensorrt", steps=1)
        assert not report.passed
        assert report.first_divergent_layer == 1

    @pytest.mark.parametrize(("share", "passes"), [(2.2, True), (2.8, False)])
    def test_how_far_logits_may_be_off(
        self, bundle: Path, monkeypatch: pytest.MonkeyPatch, share: float, passes: bool
    ) -> None:
        """2.5 times as far as between onnxruntime and torch."""
        step = TensorRTBackend.step
        off = share * TOLERANCES[Manifest.load(bundle).model.dtype].logits

        def shift(self: Any, call: Any, embeds: Any) -> np.ndarray:
            logits = step(self, call, embeds)
            logits[:, 5] += off * np.ptp(logits)
            return logits

        monkeypatch.setattr(TensorRTBackend, "step", shift)
        monkeypatch.setattr(golden, "check", lambda *_: "not checked")
        report = validate_bundle(bundle, backend="tensorrt", steps=1)
        assert {check.name for check in report.checks if not check.passed} == (set() if passes else {"logits"})

    def test_options_without_effect_are_refused(self, bundle: Path) -> None:
        with pytest.raises(OptionError, match="--model has no effect with --backend tensorrt"):
            validate_bundle(bundle, backend="tensorrt", model="tiny-llava")
        with pytest.raises(OptionError, match="--provider has no effect with --backend rtx"):
            validate_bundle(bundle, backend="rtx", provider="cpu")
        with pytest.raises(OptionError, match="give one of onnxruntime, tensorrt, rtx"):
            validate_bundle(bundle, backend="torch")
