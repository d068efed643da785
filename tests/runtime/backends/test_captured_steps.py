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
from vkvx.errors import CapacityError
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
    found = []
    for captured in (True, False):
        with opened(bits, dtype, quantizer, captured=captured) as (session, backend):
            fill(backend, seed=int(captured))
            answers = first_turns(session, pages)
            found.append(([one.token_ids for one in answers], turns(session, pages)))
            assert [len(one.token_ids) for one in answers] == [30, 7, 12, 26, 3, 20]
            if captured:
                assert backend._steps is not None
                # Four slots, then as many rows as are left; a conversation has one.
                assert set(backend._steps.graphs) == {1, 2, 3, 4}
    assert found[0] == found[1]


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
        assert list(graphs) == [1]
        session.generate([PROMPT] * 3, [page.path for page in pages[:3]], max_new_tokens=4, ignore_eos=True)
        assert list(graphs) == [1, 3]
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
        assert backend._steps is not None
        assert set(backend._steps.graphs) == {1, 4}
        backend._steps = None
        eager = step(3, 1, 0, 2)
        np.testing.assert_array_equal(together, eager)
        np.testing.assert_allclose(alone[0], together[3], rtol=0, atol=1e-4)
        assert np.ptp(together) > 1


def test_too_large_a_cache() -> None:
    with (
        pytest.raises(CapacityError, match="no memory left for a cache of this size; lower slots="),
        opened(slots=1 << 24),
    ):
        pass
