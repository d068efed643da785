"""What a call of an engine needs, found out without a GPU: profile, padding, places in memory, limits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from doubles import make_engines

from vkvx.errors import CapacityError
from vkvx.manifest import Manifest
from vkvx.runtime.backends.tensorrt.call_plan import (
    cache_buffers,
    check_cache,
    decode_rows,
    embed_copies,
    pack,
    plan_call,
)
from vkvx.runtime.cache import PackedCache
from vkvx.runtime.calls import Call, Row, build_call, place_embeds
from vkvx.runtime.engines.manifest import DECODE, PREFILL, EngineManifest, Limits

LIMITS = Limits(batch_size=4, slots=6, input_len=1400, visual_tokens=1280, text_tokens=256, pictures=2)
PICTURE, GROUP = 576, 640


class Bundle:
    """Manifests of a bundle and of engines made for it."""

    def __init__(self, path: Path, slots: int = 6, *, empty_visual_index: bool = True) -> None:
        self.manifest = Manifest.load(path)
        self.cache = PackedCache(self.manifest.layout, slots, 1280, 200)
        self.engines = EngineManifest.load(make_engines(path, LIMITS, empty_visual_index=empty_visual_index))
        self.image = self.manifest.model.image_token_id

    def row(self, slot: int, text: int, pictures: int = 0) -> Row:
        ids = [self.image] * (PICTURE * pictures) + [7] * text
        return Row(slot, np.array(ids, np.int32), (PICTURE,) * pictures, self.cache.length(slot))

    def call(self, *rows: Row) -> Call:
        return build_call(rows, group_size=GROUP, image_token_id=self.image)

    def plan(self, *rows: Row) -> object:
        return plan_call(self.engines, self.call(*rows), self.cache, self.manifest.model.hidden_size)


@pytest.fixture
def bundle(own_bundle: Path) -> Bundle:
    return Bundle(own_bundle)


def test_a_step_of_one_token_a_row_takes_the_decode_profile(bundle: Bundle) -> None:
    plan = plan_call(
        bundle.engines, bundle.call(bundle.row(3, 1), bundle.row(0, 1), bundle.row(5, 1)), bundle.cache, 256
    )
    assert plan.profile.name == DECODE
    assert plan.rows == 3
    assert plan.call.slot.tolist() == [3, 0, 5, -1]  # padded to four rows by an idle one
    assert plan.call.text_index.tolist() == [[0], [0], [0], [-1]]
    assert plan.shapes["input_ids"] == (4, 1)
    assert plan.shapes["visual_embeds"] == (4, 0, 256)


@pytest.mark.parametrize(("text", "pictures"), [(2, 0), (3, 1), (1, 2), (0, 1)])
def test_everything_else_takes_the_prefill_profile_as_it_is(bundle: Bundle, text: int, pictures: int) -> None:
    call = bundle.call(bundle.row(1, text, pictures), bundle.row(2, 1))
    plan = plan_call(bundle.engines, call, bundle.cache, 256)
    assert plan.profile.name == PREFILL
    for name in ("input_ids", "position_ids", "visual_index", "text_index", "last_index", "slot", "visual_rows"):
        np.testing.assert_array_equal(getattr(plan.call, name), getattr(call, name))
    assert plan.shapes["visual_embeds"] == (2, GROUP * pictures, 256)


def test_an_engine_without_empty_tensors_gets_a_group_of_padding(own_bundle: Path) -> None:
    bundle = Bundle(own_bundle, empty_visual_index=False)
    for rows in ([bundle.row(0, 1)], [bundle.row(0, 5), bundle.row(1, 2)]):
        plan = plan_call(bundle.engines, bundle.call(*rows), bundle.cache, 256)
        assert plan.call.visual_index.shape == plan.call.visual_rows.shape == (len(rows), GROUP)
        assert (plan.call.visual_index == -1).all()
        assert plan.shapes["visual_embeds"] == (len(rows), GROUP, 256)


def test_there_are_few_different_decode_steps() -> None:
    assert [decode_rows(rows, 12) for rows in range(1, 13)] == [1, 2, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12]
    assert decode_rows(5, 4) == 5  # too many stay too many: the profile says so


def test_a_decode_step_has_no_more_rows_than_the_cache(own_bundle: Path) -> None:
    bundle = Bundle(own_bundle, slots=3)
    plan = plan_call(bundle.engines, bundle.call(*(bundle.row(slot, 1) for slot in range(3))), bundle.cache, 256)
    assert len(plan.call.slot) == 3


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([(slot, 2, 0) for slot in range(5)], "prefill profile takes 1 to 4 rows (input_ids), got 5; run `vkvx build"
         " BUNDLE` with --max-batch-size 5 again"),
        ([(0, 1401, 0)], "1 to 1400 positions (input_ids), got 1401; run `vkvx build BUNDLE` with --max-input-len 14"),
        ([(0, 1, 3)], "1 to 1400 positions"),
    ],
)  # fmt: skip
def test_calls_beyond_the_limits_name_what_helps(bundle: Bundle, rows: list[tuple[int, int, int]], words: str) -> None:
    with pytest.raises(CapacityError) as error:
        bundle.plan(*(bundle.row(*row) for row in rows))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("capacity", "flag"),
    [
        ((7, 1280, 200), "--max-slots 7"),
        ((6, 1920, 200), "--max-visual-tokens"),
        ((6, 640, 257), "--max-text-tokens 257"),
    ],
)
def test_caches_beyond_the_limits_name_what_helps(bundle: Bundle, capacity: tuple[int, int, int], flag: str) -> None:
    with pytest.raises(CapacityError, match=flag):
        check_cache(bundle.engines, cache_buffers(bundle.engines, PackedCache(bundle.manifest.layout, *capacity)))


def test_outputs_share_the_memory_of_inputs_but_for_the_counts(bundle: Bundle) -> None:
    buffers = {buffer.name: buffer for buffer in cache_buffers(bundle.engines, bundle.cache)}
    names = {tensor.name for graph in bundle.manifest.graphs.values() for tensor in (*graph.inputs, *graph.outputs)}
    assert set(buffers) <= names
    for name, buffer in buffers.items():
        kind, _, rest = name.partition(".")
        assert buffer.alias == (f"past.{rest}" if kind == "present" else None), name
        if buffer.alias:
            assert (buffer.dtype, buffer.shape) == (buffers[buffer.alias].dtype, buffers[buffer.alias].shape)
    assert buffers["visual_count_out"].shape == (6, 2)
    assert not {"visual_count", "text_count"} & set(buffers), "each call brings its own"
    assert sum(buffer.bytes for buffer in buffers.values()) == bundle.cache.allocated_bytes
    check_cache(bundle.engines, tuple(buffers.values()))


def test_places_in_one_buffer_are_aligned_and_apart() -> None:
    offsets, size = pack({"a": (3, 5), "b": (0, 4), "c": (64,), "d": (65,)})
    assert offsets == {"a": 0, "b": 256, "c": 256, "d": 512}
    assert size == 512 + 512
    assert pack({})[1] == 256  # a buffer is never empty


@pytest.mark.parametrize("split", [1, 2, 3])
def test_runs_of_copies_lay_out_what_place_embeds_does(bundle: Bundle, split: int) -> None:
    rows = [bundle.row(4, 3, 1), bundle.row(0, 2), bundle.row(2, 1, 2), bundle.row(3, 4, 1)]
    call = bundle.call(*rows)
    embeds = np.random.default_rng(5).standard_normal((4 * PICTURE, 8)).astype(np.float16)
    pieces = np.split(embeds, [PICTURE, 3 * PICTURE][: split - 1])
    placed = np.zeros((call.visual_index.size, 8), np.float16)
    copies = list(embed_copies(call, [len(piece) for piece in pieces]))
    for target, piece, source, count in copies:
        placed[target : target + count] = pieces[piece][source : source + count]
    np.testing.assert_array_equal(placed.reshape(*call.visual_index.shape, 8), place_embeds(call, embeds))
    assert len(copies) == 4  # a copy a picture
    assert list(embed_copies(bundle.call(bundle.row(0, 2)), [])) == []
