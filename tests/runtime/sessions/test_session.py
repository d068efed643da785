"""Whole sessions over exported bundles: batches, turns, forks, poison, limits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from vkvx.errors import BundleError, CapacityError, InputError
from vkvx.manifest import Manifest
from vkvx.models.registry import sample_pages
from vkvx.runtime.cache import PackedCache
from vkvx.runtime.calls import Row, build_call, place_embeds
from vkvx.runtime.sessions.generation import Generation
from vkvx.runtime.sessions.session import Session

PAGES = sample_pages()
QUESTIONS = [
    "How much is 2 plus 3?",
    "Transcribe the page.",
    "What is at row 2 column 3 of the first page?",
    "Read row 1 of the second page.",
]
PICTURES: list[list[Path]] = [[], PAGES[:1], PAGES[1:3], [PAGES[3], PAGES[0], PAGES[2]]]
LENGTH = 12
WHOLE: dict[str, Any] = {"max_new_tokens": LENGTH, "ignore_eos": True}

BundleOf = Callable[..., Path]


def load(bundle: Path, slots: int = 1, **options: Any) -> Session:
    return Session.load(
        bundle, provider="cpu", slots=slots, verify=False, **{"text_tokens": 160, "reuse": False, **options}
    )


def prompts(session: Session) -> list[str]:
    return [
        session.format(
            [{"role": "user", "content": [{"type": "image"}] * len(pictures) + [{"type": "text", "text": question}]}]
        )
        for question, pictures in zip(QUESTIONS, PICTURES, strict=True)
    ]


def poison(cache: PackedCache, seed: int | None = None) -> None:
    """NaN, or random bits, into everything that no count covers; call it on an empty cache."""
    random = np.random.default_rng(seed)
    for buffer in cache.buffers.values():
        raw = buffer.reshape(-1).view(np.uint8)
        raw[:] = 0xFF if seed is None else random.integers(0, 256, raw.shape)


@pytest.fixture(scope="module", params=[1, 16])
def bundle(request: pytest.FixtureRequest, bundle_factory: BundleOf) -> Path:
    return bundle_factory(bits=request.param)


@pytest.fixture(scope="module")
def one_bit(bundle_factory: BundleOf) -> Path:
    return bundle_factory(bits=1)


@pytest.fixture(scope="module")
def alone(bundle: Path) -> list[Generation]:
    """Each row by itself, in a session of its own."""
    results = []
    for number in range(4):
        with load(bundle) as session:
            results.append(session.generate(prompts(session)[number], PICTURES[number], **WHOLE))
    return results


def ids(generations: list[Generation]) -> list[tuple[int, ...]]:
    return [one.token_ids for one in generations]


def test_rows_in_scattered_slots_get_what_they_get_alone(bundle: Path, alone: list[Generation]) -> None:
    with load(bundle, slots=8) as session:
        holders = [session.conversation() for _ in range(8)]
        for slot in (6, 1, 4, 3):
            holders[slot].close()
        together = session.generate(prompts(session), PICTURES, **WHOLE)
        assert ids(together) == ids(alone)
        assert [one.visual_tokens for one in together] == [0, 576, 1152, 1728]


@pytest.fixture
def feeder(bundle: Path) -> Iterator[Feeder]:
    with load(bundle, slots=6, visual_tokens=3 * 640) as session:
        yield Feeder(session)


class Feeder:
    """Drives a backend by hand: which rows take part in which call is up to the test."""

    def __init__(self, session: Session) -> None:
        self.backend = session.backend
        self.prepared = [
            session.processor.prepare(prompt, pictures)
            for prompt, pictures in zip(prompts(session), PICTURES, strict=True)
        ]
        self.answers: list[list[int]] = [[] for _ in self.prepared]

    def call(self, rows: dict[int, int]) -> np.ndarray:
        """One call for rows, by slot: a row's prompt if it has not been fed, else its last token."""
        model, cache, inputs, embeds = self.backend.manifest.model, self.backend.cache, [], []
        for number, slot in rows.items():
            prepared, answer = self.prepared[number], self.answers[number]
            if answer:
                inputs.append(Row(slot, np.array(answer[-1:], np.int32), (), cache.length(slot)))
                continue
            inputs.append(Row(slot, prepared.token_ids, prepared.picture_lengths, 0))
            if prepared.vision_calls:
                embeds.append(self.backend.encode(prepared.vision_calls[0]))
        size = self.backend.manifest.quantization.group_size
        call = build_call(inputs, group_size=size, image_token_id=model.image_token_id)
        counts = cache.counts_after(call)
        logits = self.backend.step(call, place_embeds(call, np.concatenate(embeds)) if embeds else None)
        for known, graph in zip(counts, (cache.visual_count, cache.text_count), strict=True):
            np.testing.assert_array_equal(known, graph)  # the graph's own
        for number, row in zip(rows, logits, strict=True):
            self.answers[number].append(int(row.argmax()))
        return logits


def test_one_call_of_0_to_3_pictures(feeder: Feeder, alone: list[Generation]) -> None:
    rows = {2: 0, 0: 5, 3: 1, 1: 3}
    poison(feeder.backend.cache)
    for _ in range(4):
        feeder.call(rows)
    assert [tuple(answer) for answer in feeder.answers] == [one.token_ids[:4] for one in alone]


def test_a_prefill_between_decode_calls_of_others(feeder: Feeder, alone: list[Generation]) -> None:
    poison(feeder.backend.cache, seed=1)
    feeder.call({1: 4, 0: 2})
    feeder.call({0: 2, 1: 4})
    feeder.call({3: 0})
    feeder.call({1: 4})
    feeder.call({2: 3})
    feeder.call({3: 0, 1: 4, 2: 3, 0: 2})
    for number, count in enumerate((3, 4, 2, 2)):
        assert tuple(feeder.answers[number]) == alone[number].token_ids[:count]


@pytest.mark.parametrize("seed", [None, 7])
def test_what_lies_past_the_counts_changes_nothing(bundle: Path, seed: int | None) -> None:
    results, caches = [], []
    for poisoned in (False, True):
        with load(bundle, slots=2, visual_tokens=1920) as session:
            cache = session.backend.cache
            if poisoned:
                poison(cache, seed)
                # A slot that was used before holds what its last sequence left.
                session.generate(prompts(session)[3], PICTURES[3], max_new_tokens=4)
            talk = session.conversation()
            list(talk.ask("Transcribe the page.", PAGES[:1], max_new_tokens=10))
            list(talk.ask("And this one?", PAGES[1:2], max_new_tokens=10))
            results.append(talk.token_ids)
            groups, rows = cache.group_count(talk.slot), int(cache.text_count[talk.slot])
            tiles = groups * cache.group_size // 128
            used = {"visual_key": tiles, "visual_value": tiles, "text_key": rows, "text_value": rows}
            caches.append(
                {
                    name: buffer[talk.slot, :, : used.get(name.partition(".")[2], groups)].tobytes()
                    for name, buffer in cache.buffers.items()
                }
            )
    assert results[0] == results[1]
    assert caches[0] == caches[1]


def test_other_slots_are_left_alone(bundle: Path) -> None:
    with load(bundle, slots=3) as session:
        first, second = session.conversation(), session.conversation()
        list(first.ask(QUESTIONS[1], PAGES[:1], max_new_tokens=3))
        cache = session.backend.cache
        before = {name: buffer[[0, 2]].tobytes() for name, buffer in cache.buffers.items()}
        list(second.ask(QUESTIONS[1], PAGES[1:3], max_new_tokens=3))
        assert {name: buffer[[0, 2]].tobytes() for name, buffer in cache.buffers.items()} == before


def test_a_conversation_without_pictures(bundle: Path) -> None:
    with load(bundle) as session:
        with session.conversation() as talk:
            first = "".join(talk.ask(QUESTIONS[0], max_new_tokens=LENGTH))
            assert talk.last is not None
            assert len(talk.last.token_ids) > 1  # its text is white space only
            list(talk.ask("And 3 plus 4?", max_new_tokens=LENGTH))
            assert session.backend.cache.visual_tokens(talk.slot) == 0
            assert session.backend.cache.visual_bytes_used(talk.slot) == 0
        assert session.generate(prompts(session)[0], max_new_tokens=LENGTH).text == first


def test_later_turns_stand_on_the_packed_history(bundle: Path) -> None:
    with load(bundle, slots=2) as session:
        talk = session.conversation()
        for question, pictures in zip(QUESTIONS, ([], PAGES[:1], PAGES[1:2], []), strict=True):
            list(talk.ask(question, pictures, max_new_tokens=LENGTH))
        cache = session.backend.cache
        assert cache.visual_tokens(talk.slot) == 2 * 576
        assert cache.length(talk.slot) == len(talk.token_ids) - 1
        if not session.manifest.layout.is_packed:
            # At 16 bits it makes no difference where a prompt is cut into calls.
            whole, last = talk.token_ids, talk.last
            assert last is not None
            prompt = np.array(whole[: -len(last.token_ids)], np.int32)
            pixels = [session.processor.prepare("<image>", [page]).vision_calls[0] for page in PAGES[:2]]
            embeds = np.concatenate([session.backend.encode(one) for one in pixels if one is not None])
            call = build_call([Row(1, prompt, (576, 576))], group_size=640, image_token_id=3)
            logits = session.backend.step(call, place_embeds(call, embeds))
            assert logits[0].argmax() == last.token_ids[0]


def test_a_group_of_padding_is_no_group(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the CUDA provider, which reduces no empty axis, gets calls without pictures."""
    answers = []
    for fills in (False, True):
        with load(bundle) as session:
            monkeypatch.setattr(session.backend, "_fills_empty", fills)
            texts = zip(prompts(session)[:2], PICTURES[:2], strict=True)
            answers.append([session.generate(text, pictures, **WHOLE).token_ids for text, pictures in texts])
    assert answers[0] == answers[1]


def test_fork_answers_as_the_original(bundle: Path) -> None:
    with load(bundle, slots=3) as session:
        poison(session.backend.cache)
        talk = session.conversation()
        list(talk.ask(QUESTIONS[1], PAGES[:1], max_new_tokens=8))
        twin = talk.fork()
        assert "".join(twin.ask("Read row 2.", max_new_tokens=8)) == "".join(talk.ask("Read row 2.", max_new_tokens=8))
        list(twin.ask("And this?", PAGES[1:2], max_new_tokens=8))
        third = talk.fork()
        answers = {"".join(one.ask("Read row 3.", max_new_tokens=8)) for one in (talk, third)}
        assert len(answers) == 1


def test_streams_seeds_and_waves(one_bit: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": LENGTH, "temperature": 1.5, "top_k": 20, "seed": 3}
    with load(one_bit, slots=2) as session:
        questions = prompts(session)
        generated = session.generate(questions, PICTURES, **options)
        texts = [""] * 4
        for chunk in session.stream(questions, PICTURES, **options):
            texts[chunk.row] += chunk.text
        assert texts == [one.text for one in generated]
        other = session.generate(questions, PICTURES, **{**options, "seed": 4})
        assert ids(other) != ids(generated)
    for number in range(4):
        with load(one_bit) as session:
            again = session.generate(questions[number], PICTURES[number], **options)
            assert again.token_ids == generated[number].token_ids


def test_stop_strings(one_bit: Path) -> None:
    with load(one_bit) as session:
        prompt = prompts(session)[1]
        whole = session.generate(prompt, PICTURES[1], max_new_tokens=30)
        stop = whole.text[5:8]
        cut = session.generate(prompt, PICTURES[1], max_new_tokens=30, stop=[stop])
        assert cut.finish_reason == "stop"
        assert cut.text == whole.text[: whole.text.index(stop)]
        for chunk in session.stream(prompt, PICTURES[1], max_new_tokens=30, stop=[stop]):
            assert stop not in chunk.text


def test_capacities(one_bit: Path) -> None:
    with load(one_bit, visual_tokens=640, text_tokens=40) as session, session.conversation() as talk:
        with pytest.raises(CapacityError, match="--max-visual-tokens"):
            talk.ask("Compare.", PAGES[:2], max_new_tokens=4)
        list(talk.ask("Transcribe the page.", PAGES[:1], max_new_tokens=4))
        with pytest.raises(CapacityError, match="--max-visual-tokens"):
            talk.ask("And this?", PAGES[1:2], max_new_tokens=4)
        with pytest.raises(CapacityError, match="--max-text-tokens"):
            talk.ask("Transcribe the page again.", max_new_tokens=40)
        # The cache can be filled to its last row.
        room = session.backend.cache.text_capacity - session.backend.cache.text_tokens(talk.slot)
        fed = 1 + len(session.processor.prepare("12", first=False).token_ids)
        talk.generate("12", max_new_tokens=room - fed + 1, ignore_eos=True)
        assert session.backend.cache.text_tokens(talk.slot) == 40
    with load(one_bit) as session, pytest.raises(InputError, match="1 picture"):
        session.generate("What is this?", PAGES[0])


def test_bytes_of_a_picture(one_bit: Path) -> None:
    with load(one_bit, visual_tokens=576) as session, session.conversation() as talk:
        list(talk.ask(QUESTIONS[1], PAGES[:1], max_new_tokens=2))
        used, model = session.backend.cache.visual_bytes_used(talk.slot), session.manifest.model
        live = sum(buffer.nbytes for name, buffer in session.backend.cache.buffers.items() if ".visual" in name)
        assert used == live == session.manifest.layout.visual_bytes_per_picture()
        assert 12 * live <= 576 * 2 * len(model.layers) * model.layers[0].kv_heads * model.layers[0].head_dim * 2


def test_caches_are_updated_in_place(bundle: Path, tmp_path: Path) -> None:
    """After onnxruntime's optimisations each present.* is a ScatterND on its past.*; one buffer is never copied."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(bundle / "decoder.onnx"), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph
    producers = {output: node for node in graph.node for output in node.output}
    names = [output.name for output in graph.output if output.name.startswith("present.")]
    assert len(names) == 24
    packed = Manifest.load(bundle).layout.is_packed
    for name in names:
        if packed or ".text" in name:  # at 16 bits the visual tensors are empty
            node = producers[name]
            assert (node.op_type, node.input[0]) == ("ScatterND", name.replace("present", "past"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes(bundle_factory: BundleOf, dtype: str) -> None:
    bundle = bundle_factory(bits=1, dtype=dtype)
    with load(bundle, slots=2) as session:
        cache = session.backend.cache
        assert cache.buffers["0.text_key"].dtype == np.float32  # a bfloat16 bundle runs widened on a CPU
        together = session.generate(prompts(session)[:2], PICTURES[:2], max_new_tokens=LENGTH)
        assert all(len(one.token_ids) > 1 for one in together)
        assert session.manifest.model.dtype == dtype
        types = {tensor.type for tensor in session.backend._decoder.get_inputs()}  # type: ignore[attr-defined]
        assert "tensor(bfloat16)" not in types


def test_damaged_files(one_bit: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "bundle"
    shutil.copytree(one_bit, copy)
    graph = copy / "decoder.onnx"
    raw = bytearray(graph.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    graph.write_bytes(raw)
    with pytest.raises(BundleError, match=r"decoder.onnx differs"):
        Session.load(copy)
    graph.write_bytes(b"\xff" * len(raw))
    with pytest.raises(BundleError, match=r"decoder.onnx is not a readable ONNX file"):
        Session.load(copy, verify=False)


def test_runs_without_torch(one_bit: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = None  # as if it were not installed
from vkvx.runtime.sessions.session import Session
with Session.load({str(one_bit)!r}, provider="cpu") as session:
    with session.conversation() as talk:
        print("".join(talk.ask("Transcribe the page.", {str(PAGES[0])!r}, max_new_tokens=5)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert result.stderr == ""
