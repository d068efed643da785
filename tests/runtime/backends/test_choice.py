"""Which backend a bundle gets, on which GPU, and what is said of the others."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from doubles import Cuda, install_cuda, install_tensorrt, make_engines

from vkvx.cli.generation import BACKENDS as CLI_BACKENDS
from vkvx.errors import EngineError, OptionError
from vkvx.manifest import Manifest
from vkvx.runtime import backends
from vkvx.runtime.backends import golden, registry
from vkvx.runtime.backends.registry import candidates, choose_backend
from vkvx.runtime.backends.tensorrt import device, search
from vkvx.runtime.engines.manifest import FILE_NAME, EngineManifest, Limits
from vkvx.runtime.sessions.session import Session

LIMITS = Limits(batch_size=1, slots=2, input_len=1400, visual_tokens=640, text_tokens=200, pictures=1)


def install(monkeypatch: pytest.MonkeyPatch, *capabilities: str) -> Cuda:
    cuda = install_cuda(monkeypatch, Cuda(*capabilities))
    install_tensorrt(monkeypatch, cuda)
    return cuda


def harm(directory: Path) -> None:
    (directory / FILE_NAME).write_text("{}")


def test_a_damaged_directory_leaves_the_others_alone(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "9.0")
    make_engines(own_bundle, LIMITS)
    harm(make_engines(own_bundle, LIMITS, capability="8.9", backend="rtx"))
    with Session.load(own_bundle, verify=False) as session:
        assert (session.backend.name, session.backend.device) == ("tensorrt", "Stand-in (GPU 0)")
    with pytest.raises(EngineError, match=r"engines/rtx-8.9: engine.json is of no engine directory"):
        Session.load(own_bundle, backend="rtx", verify=False)


def test_every_directory_has_a_reason_of_its_own(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "9.0")
    harm(make_engines(own_bundle, LIMITS))
    make_engines(own_bundle, LIMITS, capability="8.9")
    manifest = Manifest.load(own_bundle)
    found = choose_backend("auto", own_bundle, manifest)
    assert found.name == "onnxruntime"
    with pytest.raises(EngineError) as error:
        choose_backend("tensorrt", own_bundle, manifest).open()
    for words in (str(error.value), found.reason):
        assert "tensorrt-8.9 is for compute capability 8.9, the machine has 9.0" in words
        assert f"{own_bundle}/engines/tensorrt-9.0: engine.json is of no engine directory" in words
        assert "rtx" not in words


def test_engines_run_on_the_gpu_that_they_are_for(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = install(monkeypatch, "9.0", "8.9")
    make_engines(own_bundle, LIMITS, capability="8.9")
    with Session.load(own_bundle, verify=True) as session:
        assert session.backend.device == "Stand-in (GPU 1)"
        assert session.backend_reason == "the bundle has engines for Stand-in (GPU 1)"
        assert cuda.touched == {1}
        make_engines(own_bundle, LIMITS)
    found = choose_backend("auto", own_bundle, Manifest.load(own_bundle))
    assert (found.gpu, found.limits) == (0, LIMITS)  # the first GPU that there are engines for


def test_threads_use_the_gpu_of_the_session(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a new thread GPU 0 is the current one."""
    install(monkeypatch, "9.0", "8.9")
    make_engines(own_bundle, LIMITS, capability="8.9")
    results: list[Any] = []

    def work() -> None:
        try:
            logits = golden.run(session.backend, 0)
            session.backend.cache.fork(0, 1)
            results.append((logits, session.backend.cache.read("0.text_key")))
            embeds = session.backend.encode(golden.picture(session.manifest).arrays)
            results.append(embeds)
        except BaseException as error:
            results.append(error)

    with Session.load(own_bundle, slots=2, verify=False) as session:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert len(results) == 2, results
        golden.run(session.backend, 1)


def test_engines_are_read_once_and_get_one_device(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "9.0")
    make_engines(own_bundle, LIMITS)
    counts = {"manifest": 0, "device": 0, "gpus": 0}

    def count(name: str, function: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **options)

        return counted

    monkeypatch.setattr(EngineManifest, "load", count("manifest", EngineManifest.load))
    monkeypatch.setattr(search, "find_gpus", count("gpus", search.find_gpus))
    monkeypatch.setattr(device.Device, "__init__", count("device", device.Device.__init__))
    Session.load(own_bundle).close()
    assert counts == {"manifest": 1, "device": 1, "gpus": 1}


def test_engines_of_another_bundle_are_passed_over(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "9.0")
    make_engines(own_bundle, LIMITS)
    text = (own_bundle / "vkvx.json").read_text()
    (own_bundle / "vkvx.json").write_text(text + "\n")
    found = choose_backend("auto", own_bundle, Manifest.load(own_bundle))
    assert found.name == "onnxruntime"
    assert "the engines tensorrt-9.0 were built from another state of the bundle" in found.reason


def test_all_candidates_in_order(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "9.0")
    manifest = Manifest.load(own_bundle)
    found = list(candidates(own_bundle, manifest))
    assert tuple(one.name for one in found) == registry.BACKENDS == ("tensorrt", "rtx", "torch", "onnxruntime")
    assert [one.against for one in found[:2]] == ["", ""]  # nobody has built any
    assert found[-1].against is None
    assert set(CLI_BACKENDS) == {"auto", *registry.BACKENDS}
    for options, words in (({"provider": "tpu"}, "give one of auto, cpu, cuda"), ({"threads": 0}, "--threads")):
        for name in ("auto", *registry.BACKENDS):
            with pytest.raises(OptionError, match=words):
                choose_backend(name, own_bundle, manifest, **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="unknown backend 'vulkan'"):
        choose_backend("vulkan", own_bundle, manifest)


def test_a_new_backend_is_a_folder_and_a_line(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "vulkan"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from vkvx.runtime.backends.base import Candidate\n"
        "def find(bundle, manifest, provider, threads):\n"
        "    return [Candidate('vulkan', 'it is new', None, lambda **capacity: capacity)]\n"
    )
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(tmp_path)])
    monkeypatch.setitem(registry._FOLDERS, "vulkan", ("vulkan",))
    *_, last = candidates(tiny_bundle, Manifest.load(tiny_bundle))
    assert (last.name, last.open(slots=1)) == ("vulkan", {"slots": 1})
