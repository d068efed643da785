"""Sessions in torch over exported bundles, on a CPU: the same tokens as in onnxruntime, and the choice of a backend."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fakes import manifest
from samples import bundled_pages
from transformers import LlavaForConditionalGeneration

from vkvx import ExportOptions, export_model
from vkvx.errors import BundleError, CapacityError, DependencyError, OptionError
from vkvx.manifest import Manifest
from vkvx.models.registry import resolve, sample_pages
from vkvx.runtime.backends.registry import choose_backend
from vkvx.runtime.backends.torch import backend as torch_backend
from vkvx.runtime.backends.torch.capture import is_step
from vkvx.runtime.backends.torch.loading import load_model
from vkvx.runtime.cache import PackedCache
from vkvx.runtime.calls import Row, build_call
from vkvx.runtime.sessions.processor import user_message
from vkvx.runtime.sessions.session import Session

PAGES = sample_pages()
QUESTIONS = ["Transcribe the page.", "How much is 2 plus 3?", "Read row 1 of the second page.", "Read row 2."]
PICTURES: list[list[Path]] = [PAGES[:1], [], PAGES[1:3], PAGES[3:4]]
LENGTHS = (12, 3, 6, 10)

BundleOf = Callable[..., Path]


def load(bundle: Path, backend: str = "torch", **options: Any) -> Session:
    return Session.load(bundle, backend=backend, provider="cpu", verify=False, **{"text_tokens": 160, **options})


def answers(session: Session) -> list[tuple[int, ...]]:
    """Rows of different lengths, and more of them than slots: a row leaves and another takes its slot."""
    prompts = [
        session.format([{"role": "user", "content": [{"type": "image"}] * len(p) + [{"type": "text", "text": q}]}])
        for q, p in zip(QUESTIONS, PICTURES, strict=True)
    ]
    options = [session.options(None, {"max_new_tokens": n, "ignore_eos": True}) for n in LENGTHS]
    return [one.token_ids for one in session.generate(prompts, PICTURES, options=options)]


def turns(session: Session) -> list[tuple[int, ...]]:
    """Pictures in later turns, and a fork."""
    talk = session.conversation()
    list(talk.ask(QUESTIONS[0], PAGES[:1], max_new_tokens=12))
    twin = talk.fork()
    list(twin.ask("And this one?", PAGES[1:2], max_new_tokens=12))
    list(talk.ask("Read row 2.", max_new_tokens=8))
    found = [talk.token_ids, twin.token_ids]
    twin.close()
    talk.close()
    return found


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_same_tokens_as_onnxruntime(bundle_factory: BundleOf, bits: int) -> None:
    bundle = bundle_factory(bits=bits, dtype="float32")
    found = []
    for backend in ("torch", "onnxruntime"):
        with load(bundle, backend, slots=2, visual_tokens=3 * 640) as session:
            assert (session.backend.name, session.backend.provider) == (backend, "cpu")
            assert session.backend_reason == "it was asked for"
            found.append((answers(session), turns(session) if bits in (1, 16) else []))
    assert found[0] == found[1]
    assert [len(row) for row in found[0][0]] == list(LENGTHS)


def test_same_tokens_with_text_of_8_bits(bundle_factory: BundleOf) -> None:
    bundle = bundle_factory(key_bits=2, value_bits=1, dtype="float32", text_bits=8)
    found = []
    for backend in ("torch", "onnxruntime"):
        with load(bundle, backend, slots=2, visual_tokens=3 * 640) as session:
            cache = session.backend.cache
            assert cache.read("0.text_key").shape == (2, 2, 160, 17)
            assert cache.layout.text_bytes_per_token == 4 * 2 * 2 * 4 * 17  # layers, heads, kinds, bytes, words
            found.append(turns(session))
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_pages_in_16_bits(bundle_factory: BundleOf, dtype: str) -> None:
    """Rounded elsewhere than in onnxruntime, so only the text that the model is sure of is the same."""
    bundle = bundle_factory(bits=1, dtype=dtype) if dtype != "float16" else bundle_factory(bits=1)
    texts = []
    for backend in ("torch", "onnxruntime"):
        with load(bundle, backend) as session:
            prompt = session.format([user_message(QUESTIONS[0], 1)])
            texts.append(session.generate(prompt, PAGES[0], max_new_tokens=30).text)
            assert backend != "torch" or session.backend.cache.read("0.text_key").dtype.name == dtype
    assert texts[0] == texts[1]


@pytest.mark.parametrize("bits", [1, 16])
def test_what_lies_past_the_counts_changes_nothing(bundle_factory: BundleOf, bits: int) -> None:
    found = []
    for poisoned in (False, True):
        with load(bundle_factory(bits=bits), slots=3, visual_tokens=2 * 640) as session:
            cache = session.backend.cache
            if poisoned:
                for buffer in cache.buffers.values():
                    buffer.reshape(-1).view(np.uint8)[:] = 0xFF
            addresses = [buffer.ctypes.data for buffer in cache.buffers.values()]
            holder = session.conversation()
            list(holder.ask(QUESTIONS[0], PAGES[:1], max_new_tokens=3))
            before = {name: buffer[[0, 2]].tobytes() for name, buffer in cache.buffers.items()}
            talk = session.conversation()
            list(talk.ask(QUESTIONS[0], PAGES[1:2], max_new_tokens=8))
            assert {name: buffer[[0, 2]].tobytes() for name, buffer in cache.buffers.items()} == before
            found.append((holder.token_ids, talk.token_ids))
            assert [buffer.ctypes.data for buffer in cache.buffers.values()] == addresses
    assert found[0] == found[1]


def test_the_example_of_the_documentation(
    bundle_factory: BundleOf, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = (Path(__file__).parents[3] / "docs" / "torch.md").read_text(encoding="utf-8")
    _, example = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    (tmp_path / "tiny").symlink_to(bundle_factory(bits=1))
    for name, page in zip(("a.png", "b.png"), PAGES, strict=False):
        (tmp_path / name).symlink_to(page)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(example, found)
    truths = [page.truth.splitlines()[1] for page in bundled_pages()[:2]]
    assert [answer.text.strip() for answer in found["answers"]] == truths
    if not torch.cuda.is_available():
        assert capsys.readouterr().out == "cpu False\n"


def test_streams_and_capacities(bundle_factory: BundleOf) -> None:
    with load(bundle_factory(bits=1), visual_tokens=640, text_tokens=60) as session:
        prompt = session.format([user_message(QUESTIONS[0], 1)])
        whole = session.generate(prompt, PAGES[0], max_new_tokens=12)
        stream = session.stream(prompt, PAGES[0], max_new_tokens=12)
        pieces = [next(stream).text for _ in range(5)]
        assert whole.text.startswith("".join(pieces))
        assert not session.backend.cache.free_slots
        stream.close()
        assert session.backend.cache.free_slots == (0,)
        with session.conversation() as talk:
            with pytest.raises(CapacityError, match="--max-visual-tokens"):
                talk.ask("Compare.", PAGES[:2], max_new_tokens=4)
            with pytest.raises(CapacityError, match="--max-text-tokens"):
                talk.ask(QUESTIONS[0], PAGES[:1], max_new_tokens=60)
            list(talk.ask(QUESTIONS[0], PAGES[:1], max_new_tokens=4))
            cache = session.backend.cache
            # Text can be taken back.
            rows, history = int(cache.text_count[0]), list(talk._history)
            list(talk.ask("Read row 2.", max_new_tokens=6))
            said = talk.token_ids
            cache.text_count[0], talk._history[:], talk._messages[-2:] = rows, history, []
            list(talk.ask("Read row 2.", max_new_tokens=6))
            assert talk.token_ids == said


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_bundle_is_a_checkpoint(bundle_factory: BundleOf, dtype: str, tmp_path: Path) -> None:
    """Copied and converted weights: transformers finds each of them, those that no graph uses included."""
    bundle = bundle_factory(bits=1, dtype=dtype) if dtype != "float16" else bundle_factory(bits=1)
    model, info = LlavaForConditionalGeneration.from_pretrained(bundle, dtype=dtype, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    original = load_model(resolve("tiny-llava"), getattr(torch, dtype)).state_dict()
    assert model.state_dict().keys() == original.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, original[name]), name


def test_needs_nothing_but_the_bundle(checkpoint: Path, tmp_path: Path) -> None:
    """Sharded weights with names of the hub, converted, in a directory that was moved; the checkpoint is gone."""
    source = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    export_model(source, tmp_path / "first", ExportOptions(dtype="float16", bits=2))
    shutil.rmtree(source)
    bundle = (tmp_path / "first").rename(tmp_path / "second")
    index = json.loads((bundle / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"weights-00001-of-00001.safetensors"}
    found = []
    for backend in ("torch", "onnxruntime"):
        with load(bundle, backend) as session:
            image = PAGES[0]
            embeds = session.backend.encode(session.processor.prepare("<image>", [image]).vision_calls[0])
            found.append(embeds.astype(np.float32))
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=2e-2 * np.ptp(found[1]))


@pytest.fixture
def copy(bundle_factory: BundleOf, tmp_path: Path) -> Path:
    """A bundle to spoil."""
    return Path(shutil.copytree(bundle_factory(bits=1), tmp_path / "bundle"))


def forget_sizes(bundle: Path) -> None:
    """Let the manifest say that the files have the sizes that they have."""
    manifest = json.loads((bundle / "vkvx.json").read_text())
    for name, info in manifest["files"].items():
        info["bytes"] = (bundle / name).stat().st_size
    (bundle / "vkvx.json").write_text(json.dumps(manifest))


def test_refusals(copy: Path) -> None:
    with pytest.raises(OptionError, match=r"unknown backend 'tf' \(--backend\): give one of auto, tensorrt, rtx"):
        load(copy, "tf")
    with pytest.raises(OptionError, match=r"threads .* at least 1, got 0"):
        load(copy, threads=0)
    with pytest.raises(OptionError, match="unknown provider 'tpu'"):
        Session.load(copy, backend="torch", provider="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(DependencyError, match="torch finds no CUDA device; give provider='cpu'"):
            Session.load(copy, backend="torch", provider="cuda")
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match=r"config.json has \d+ bytes, expected"):
        Session.load(copy, backend="torch")
    forget_sizes(copy)
    with pytest.raises(BundleError, match=r"cannot load the model of .*has layers 3, the bundle's model has 4"):
        load(copy)
    (copy / "vkvx-metrics.safetensors").write_bytes(b"\0" * 100)
    config["text_config"]["num_hidden_layers"] = 4
    (copy / "config.json").write_text(json.dumps(config))
    forget_sizes(copy)
    with pytest.raises(BundleError, match=r"cannot read .*vkvx-metrics.safetensors .*export the model again"):
        load(copy)


def test_older_bundles(copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    manifest = json.loads((copy / "vkvx.json").read_text())
    for name in ("config.json", "model.safetensors.index.json"):
        (copy / name).unlink()
        del manifest["files"][name]
    (copy / "vkvx.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"holds no config.json.*export the model again"):
        load(copy)
    on_a_gpu(monkeypatch, tmp_path)
    with Session.load(copy, threads=None) as session:
        assert session.backend.name == "onnxruntime"
        assert "config.json" in session.backend_reason


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """As if there were a GPU and a built library."""
    library = folder / "libvkvx.so"
    library.touch()
    monkeypatch.setenv("VKVX_LIBRARY", str(library))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_choice_of_a_backend(copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    manifest = Manifest.load(copy)

    def choose(*options: Any, **more: Any) -> tuple[str, str]:
        found = choose_backend("auto", copy, manifest, *options, **more)
        return found.name, found.reason

    on_a_gpu(monkeypatch, tmp_path)
    assert choose() == ("torch", "there is a GPU, and libvkvx is built")
    assert choose("cuda")[0] == "torch"
    assert choose("cpu") == ("onnxruntime", "the CPU was asked for")
    assert choose(threads=2) == ("onnxruntime", "a number of CPU threads was asked for")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose() == ("onnxruntime", "torch finds no GPU")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert choose() == ("onnxruntime", "safetensors is not installed")
    monkeypatch.delenv("VKVX_LIBRARY")
    monkeypatch.setenv("VKVX_CACHE", str(tmp_path))
    assert choose() == ("onnxruntime", "libvkvx is not built (vkvx plugin build)")


def test_torch_is_not_loaded_without_a_library(bundle_factory: BundleOf, tmp_path: Path) -> None:
    code = f"""
import sys
from vkvx.runtime.sessions.session import Session
with Session.load({str(bundle_factory(bits=1))!r}, verify=False) as session:
    assert session.backend.name == "onnxruntime", session.backend_reason
assert "vkvx.export" not in sys.modules
"""
    environment = {"PATH": "", "VKVX_CACHE": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr


def test_which_calls_are_decode_steps() -> None:
    def takes(*rows: Row) -> bool:
        return is_step(build_call(rows, group_size=128, image_token_id=3))

    token = Row(0, np.array([7]), (), 5)
    assert takes(token)
    assert takes(token, Row(1, np.array([3]), (), 9))
    assert takes(token, Row(1, np.arange(4, 12), (), 9))
    assert not takes(token, Row(1, np.arange(4, 13), (), 9))
    assert not takes(token, Row(-1, np.zeros(0, int)))
    assert not takes(Row(0, np.array([3]), (1,), 5))


@pytest.mark.parametrize(("bits", "room"), [(1, 512 + 64), (16, 400 + 64)])
def test_graphs_of_prompts_are_no_longer_than_a_slot(monkeypatch: pytest.MonkeyPatch, bits: int, room: int) -> None:
    """Calls are padded to parts of the limit: one that no prompt reaches would cost memory and time."""
    monkeypatch.setattr(torch_backend, "Prefills", lambda *given: given[-1])
    facts = manifest(bits)
    given = {"_steps": 1, "_stream": 1, "_decoder": 1, "_buffers": [], "_running": lambda what: nullcontext()}
    double: Any = SimpleNamespace(manifest=facts, cache=PackedCache(facts.layout, 1, 400, 64), **given)
    for limit, expected in ((300, 300), (10**6, room)):
        torch_backend.TorchBackend.capture_prefills(double, limit)
        assert double._prefills == expected
