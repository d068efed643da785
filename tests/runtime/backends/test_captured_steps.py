"""Sessions in torch on a GPU: captured decode steps give what eager ones give, in the same memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from samples import Page

from vkvx import ExportOptions
from vkvx.errors import BatchError, CapacityError, VkvxError
from vkvx.manifest import Graph, Manifest
from vkvx.models.registry import resolve
from vkvx.runtime.backends.torch.backend import TorchBackend
from vkvx.runtime.backends.torch.loading import load_reference
from vkvx.runtime.calls import Row, build_call
from vkvx.runtime.sessions.processor import Processor
from vkvx.runtime.sessions.session import Session

pytestmark = [pytest.mark.gpu, pytest.mark.kernels]

PROMPT = "USER: <image>\nTranscribe the page. ASSISTANT:"
CHOICES = [(1, "float16", "shaped"), (2, "bfloat16", "lloyd"), (4, "float16", "quantile"), (8, "float32", "lloyd")]
CHOICES += [(16, "float16", "")]


@contextmanager
def opened(
    bits: int = 1,
    dtype: str = "float16",
    quantizer: str = "lloyd",
    *,
    device: str = "cuda",
    captured: bool = True,
    **capacity: Any,
) -> Iterator[tuple[Session, TorchBackend]]:
    """tiny-llava as the torch backend runs a bundle of it; needs no exporter."""
    source = resolve("tiny-llava")
    info = source.info(dtype)
    options = ExportOptions(bits=bits, dtype=dtype, quantizer=None if bits == 16 else quantizer)
    quantization = options.resolve(info.cached_layers, info.typical_tokens)
    graphs = {"vision": Graph("", 18, source.family.pixel_inputs(source.config), ())}
    manifest = Manifest("", 1, info, quantization, graphs, ".", {})
    capacity = {"slots": 4, "visual_tokens": 3 * 640, "text_tokens": 256} | capacity
    backend = load_reference(source, manifest, device=device, **capacity)
    assert backend.captures == (device == "cuda")
    if not captured:
        backend._steps = None
    with Session(manifest, backend, Processor.of_checkpoint(source, info)) as session:
        yield session, backend


def counted(name: str = "allocation.all.allocated") -> int:
    """How many blocks of GPU memory have been allocated so far."""
    return torch.cuda.memory_stats()[name]


def fill(backend: TorchBackend, seed: int) -> None:
    """Random bits, NaN among them, into everything that no count covers; call it on an empty cache."""
    generator = torch.Generator("cuda").manual_seed(seed)
    for buffer in backend.cache.buffers.values():
        if buffer.numel():
            buffer.view(torch.uint8).random_(0, 256, generator=generator)


def rows_captured(backend: TorchBackend, *, sampled: bool = True) -> list[int]:
    """Numbers of rows of which a step of one token has been captured."""
    assert backend._steps is not None
    return sorted(size.rows for size in backend._steps.graphs if size.positions == 1 and size.sampled == sampled)


def first_turns(session: Session, pages: list[Page]) -> list[Any]:
    """Six prompts of 0 to 2 pictures in four slots, with answers of different lengths: rows join and leave."""
    prompts = [PROMPT, PROMPT.replace("<image>", "<image><image>"), "USER: 2 plus 3?", PROMPT, PROMPT, "USER: Hi."]
    pictures = [[pages[0].path], [pages[1].path, pages[2].path], None, [pages[3].path], [pages[2].path], None]
    lengths = (30, 7, 12, 26, 3, 20)
    options = [session.options(None, {"max_new_tokens": length, "ignore_eos": True}) for length in lengths]
    return session.generate(prompts, pictures, options=options)


def turns(session: Session, pages: list[Page]) -> list[tuple[int, ...]]:
    """A conversation with a second picture, forked, and the text of its last turn taken back and asked again."""
    found = []
    cache = session.backend.cache
    talk = session.conversation()
    list(talk.ask("Transcribe the page.", [pages[0].path], max_new_tokens=20))
    twin = talk.fork()
    list(twin.ask("Transcribe the page.", [pages[1].path], max_new_tokens=20))
    list(talk.ask("Read row 2.", max_new_tokens=8))
    found += [talk.token_ids, twin.token_ids]
    rows, length = int(cache.text_count[talk.slot]), len(talk.token_ids)
    list(talk.ask("Read row 3.", max_new_tokens=8))
    answer = talk.token_ids[length:]
    cache.text_count[talk.slot] = rows
    del talk._history[length:]
    talk._messages[-2:] = []
    list(talk.ask("Read row 3.", max_new_tokens=8))
    assert talk.token_ids[length:] == answer
    talk.close()
    twin.close()
    return [*found, answer]


@pytest.mark.parametrize(("bits", "dtype", "quantizer"), CHOICES)
def test_captured_as_eager(pages: list[Page], bits: int, dtype: str, quantizer: str) -> None:
    """With six slots the same rows run together in both ways: products of 16 bits are rounded differently for other
    numbers of rows, and tokens that are nearly as likely change places."""
    found = []
    for captured in (True, False):
        with opened(bits, dtype, quantizer, captured=captured, slots=6) as (session, backend):
            fill(backend, seed=int(captured))
            answers = first_turns(session, pages)
            found.append(([one.token_ids for one in answers], turns(session, pages)))
            assert [len(one.token_ids) for one in answers] == [30, 7, 12, 26, 3, 20]
            if captured:
                assert rows_captured(backend) == [1, 2, 3, 4, 5, 6]  # as many rows as are left
    assert found[0] == found[1]


WAYS: list[dict[str, Any]] = [
    {"max_new_tokens": 30},
    {"max_new_tokens": 1, "logprobs": True},
    {"max_new_tokens": 25, "temperature": 0.8, "top_p": 0.9, "seed": 4, "logprobs": True},
    {"max_new_tokens": 40, "temperature": 1.5, "top_k": 20, "repetition_penalty": 1.3, "ignore_eos": True},
    {"max_new_tokens": 30, "stop": ("1", "2", "3")},
    {"max_new_tokens": 17, "temperature": 3.0, "seed": 2**63, "ignore_eos": True},
]


def test_tokens_chosen_on_the_gpu(pages: list[Page], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers as from logits on the host, though a step is under way while tokens are read."""
    prompts, pictures = [PROMPT] * len(WAYS), [pages[row % 4].path for row in range(len(WAYS))]
    found: list[Any] = []
    for on_gpu in (True, False):
        if not on_gpu:
            monkeypatch.setattr(TorchBackend, "samples", False)
        with opened(dtype="float32") as (session, backend):
            options = [session.options(None, way) for way in WAYS]
            answers = session.generate(prompts, pictures, options=options)
            with session.conversation() as talk:
                for text in ("Transcribe the page.", "Read row 2.", "And row 3."):
                    list(talk.ask(text, [pages[0].path] if not talk.messages else [], max_new_tokens=12, stop=("4",)))
                history = talk.token_ids
            assert len(backend.cache.free_slots) == 4
            assert backend._steps is not None
            assert {size.sampled for size in backend._steps.graphs} == {on_gpu}
        found.append([(one.text, one.token_ids, one.finish_reason) for one in answers] + [history])
        assert [one.logprobs is not None for one in answers] == [way.get("logprobs", False) for way in WAYS]
        found.append(np.concatenate([one.logprobs for one in answers if one.logprobs is not None]))
    assert found[0] == found[2]
    np.testing.assert_allclose(found[1], found[3], rtol=1e-4, atol=1e-5)
    assert {"eos", "stop", "length"} == {reason for _, _, reason in found[0][:-1]}


def test_compiled_steps(pages: list[Page]) -> None:
    """Steps that torch.compile fuses are as near to FP32 as those that it does not, and choose the same tokens."""
    logits: dict[str, list[np.ndarray]] = {}
    texts: dict[str, Any] = {}
    for way in ("float32", "float16", "compiled"):
        with opened(dtype="float32" if way == "float32" else "float16") as (session, backend):
            if way == "compiled":
                backend.compile()
            texts[way] = session.generate([PROMPT] * 2, [page.path for page in pages[:2]], max_new_tokens=30)
            talk, logits[way] = session.conversation(), []
            list(talk.ask("Transcribe the page.", [pages[0].path], max_new_tokens=1))
            for token in (19, 24, 25, 26):
                call = build_call([backend.cache.row(talk.slot, np.array([token]))], group_size=640, image_token_id=3)
                logits[way].append(backend.step(call, None)[0])
            assert backend._steps is not None
            assert backend._steps._is_compiled == (way == "compiled")
    assert [one.token_ids for one in texts["compiled"]] == [one.token_ids for one in texts["float32"]]
    errors = {way: np.abs(np.subtract(logits[way], logits["float32"])).max() for way in ("float16", "compiled")}
    assert 0 < errors["compiled"] < 2 * errors["float16"]


def test_a_row_that_is_no_numbers_fails_alone(pages: list[Page], monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN of one picture: that row ends, its slot is given back, a conversation goes on where it was."""
    with opened(dtype="float32") as (session, backend):
        images = [page.path for page in pages[:3]]
        expected = session.generate([PROMPT] * 3, images, max_new_tokens=20)
        encode, calls = TorchBackend.encode, []

        def poisoned(self: TorchBackend, inputs: Any) -> Any:
            embeds = encode(self, inputs)
            calls.append(1)
            if len(calls) == 2:
                torch.cuda.synchronize()  # the tower writes them on a stream of the backend's
                embeds.tensor[:] = float("nan")  # type: ignore[union-attr]
                torch.cuda.synchronize()
            return embeds

        monkeypatch.setattr(TorchBackend, "encode", poisoned)
        with pytest.raises(BatchError) as caught:
            session.generate([PROMPT] * 3, images, max_new_tokens=20)
        assert list(caught.value.errors) == [1]
        kept = [caught.value.generations[row].token_ids for row in (0, 2)]  # type: ignore[union-attr]
        assert kept == [expected[row].token_ids for row in (0, 2)]
        assert len(backend.cache.free_slots) == 4
        talk = session.conversation()
        calls.clear()
        calls.append(1)
        with pytest.raises(VkvxError, match="among the logits"):
            list(talk.ask("Transcribe the page.", [images[0]], max_new_tokens=5))
        assert backend.cache.length(talk.slot) <= len(talk.token_ids)


@pytest.mark.parametrize(("bits", "quantizer"), [(1, "shaped"), (4, "lloyd"), (16, "")])
def test_as_on_the_cpu(pages: list[Page], bits: int, quantizer: str) -> None:
    found = []
    for device in ("cuda", "cpu"):
        with opened(bits, "float32", quantizer, device=device) as (session, _):
            found.append(session.generate([PROMPT] * 4, [page.path for page in pages[:4]], max_new_tokens=30))
    texts = [[one.text for one in answers] for answers in found]
    assert texts[0] == texts[1]


def test_one_graph_for_each_number_of_rows(pages: list[Page]) -> None:
    with opened() as (session, backend):
        assert backend._steps is not None
        graphs = backend._steps.graphs
        session.generate(PROMPT, pages[0].path, max_new_tokens=4)
        assert rows_captured(backend) == [1]
        session.generate([PROMPT] * 3, [page.path for page in pages[:3]], max_new_tokens=4, ignore_eos=True)
        assert rows_captured(backend) == [1, 3]
        before = dict(graphs)
        session.generate([PROMPT] * 3, [page.path for page in pages[1:4]], max_new_tokens=4, ignore_eos=True)
        session.generate(PROMPT, pages[1].path, max_new_tokens=4)
        assert graphs == before


def test_steps_allocate_nothing_and_caches_stay_where_they_are(pages: list[Page]) -> None:
    with opened() as (session, backend):
        addresses = {name: buffer.data_ptr() for name, buffer in backend.cache.buffers.items()}
        for captured in (True, False):
            if not captured:
                backend._steps = None
            chunks = session.stream([PROMPT] * 3, [page.path for page in pages[:3]], max_new_tokens=30, ignore_eos=True)
            blocks = []
            for _ in chunks:
                blocks.append(counted())
            steps = blocks[6:]  # after the prefill, and the first step, which captures
            assert len(steps) == 3 * 28
            # An eager step allocates; so the counter counts.
            assert (len(set(steps)) == 1) == captured
        assert {name: buffer.data_ptr() for name, buffer in backend.cache.buffers.items()} == addresses


def test_a_step_touches_its_own_slots_only(pages: list[Page]) -> None:
    with opened() as (session, backend):
        fill(backend, seed=3)
        cache, talk = backend.cache, session.conversation()
        list(talk.ask("Transcribe the page.", [pages[0].path], max_new_tokens=3))
        before = {name: cache.read(name).copy() for name in cache.buffers}
        length, rows = cache.length(talk.slot), int(cache.text_count[talk.slot])
        call = build_call([Row(talk.slot, np.array([7]), (), length)], group_size=640, image_token_id=3)
        logits = backend.step(call, None)
        assert np.isfinite(logits).all()
        assert int(cache.text_count[talk.slot]) == rows + 1
        for name in cache.buffers:
            after, expected = cache.read(name).copy(), before[name]
            if "text" in name:
                assert (after[talk.slot, :, rows].tobytes()) != expected[talk.slot, :, rows].tobytes()
                expected[talk.slot, :, rows] = after[talk.slot, :, rows]
            assert after.tobytes() == expected.tobytes()


def test_logits_of_both_ways_and_of_any_batch() -> None:
    """The same history in four slots: a graph of four rows, one of one row, and an eager call agree."""
    rng = np.random.default_rng(0)
    with opened(dtype="float32") as (_, backend):
        cache = backend.cache
        slots = [cache.acquire() for _ in range(4)]
        prompt = rng.integers(4, 400, 21).astype(np.int32)
        rows = [Row(slot, prompt, (), 0) for slot in slots]
        backend.step(build_call(rows, group_size=640, image_token_id=3), None)

        def step(*chosen: int) -> np.ndarray:
            call = build_call(
                [Row(slot, np.array([9], np.int32), (), 21) for slot in chosen], group_size=640, image_token_id=3
            )
            logits = backend.step(call, None)
            cache.text_count[list(chosen)] = 21
            return logits

        together, alone = step(3, 1, 0, 2), step(2)
        assert rows_captured(backend, sampled=False) == [1, 4]
        backend._steps = None
        eager = step(3, 1, 0, 2)
        np.testing.assert_array_equal(together, eager)
        np.testing.assert_allclose(alone[0], together[3], rtol=0, atol=1e-4)
        assert np.ptp(together) > 1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_steps_of_several_tokens(dtype: str) -> None:
    """Calls of 1 to 8 text tokens a row, rows of different lengths among them: captured as eager, to the bit."""
    rng = np.random.default_rng(1)
    lengths = [(2,), (8,), (3, 8), (1, 4, 2), (7, 7, 7, 7), (5, 1, 1, 1)]
    tokens = [[rng.integers(4, 400, length).astype(np.int32) for length in call] for call in lengths]
    found = []
    for captured in (True, False):
        with opened(dtype=dtype, captured=captured) as (_, backend):
            fill(backend, seed=int(captured))
            slots = [backend.cache.acquire() for _ in range(4)]
            first = [backend.cache.row(slot, np.arange(10, 31 + slot, dtype=np.int32)) for slot in slots]
            backend.step(build_call(first, group_size=640, image_token_id=3), None)
            logits = []
            for _ in range(2):  # the second time by the graphs of the first
                for call in tokens:
                    rows = [backend.cache.row(slot, ids) for slot, ids in zip(slots, call, strict=False)]
                    logits.append(backend.step(build_call(rows, group_size=640, image_token_id=3), None))
            found.append((logits, backend.cache.text_count.tolist()))
            if captured:
                assert backend._steps is not None
                assert {size[:2] for size in backend._steps.graphs} == {(len(call), max(call)) for call in lengths}
    assert found[0][1] == found[1][1] == [21 + 2 * sum(call[0] for call in lengths), *found[0][1][1:]]
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert np.ptp(one) > 1
        np.testing.assert_array_equal(one, other)


def test_several_tokens_as_one_after_another() -> None:
    """Logits after three guessed tokens, in FP32, are those of three steps; both come from graphs."""
    found = []
    for guesses in ([[7, 8, 9]], [[7], [8], [9]]):
        with opened(dtype="float32") as (_, backend):
            slot = backend.cache.acquire()
            row = backend.cache.row(slot, np.arange(10, 40, dtype=np.int32))
            backend.step(build_call([row], group_size=640, image_token_id=3), None)
            for ids in guesses:
                row = backend.cache.row(slot, np.array(ids, np.int32))
                logits = backend.step(build_call([row], group_size=640, image_token_id=3), None)
            assert backend._steps is not None
            assert [size[:2] for size in backend._steps.graphs] == [(1, len(guesses[0]))]
            found.append(logits)
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-4)
    assert np.ptp(found[0]) > 1


def test_too_large_a_cache() -> None:
    with (
        pytest.raises(CapacityError, match="no memory left for a cache of this size; lower slots="),
        opened(slots=1 << 24),
    ):
        pass
