"""The packed cache: capacities, slots, lengths, bytes and forks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fakes import GROUP, IMAGE, manifest

from vkvx.cache_layout import CacheLayout
from vkvx.errors import CapacityError
from vkvx.manifest import LayerInfo, LinearInfo
from vkvx.runtime.cache import HostStorage, PackedCache, Shape
from vkvx.runtime.calls import Row, build_call


def fill(cache: PackedCache, slot: int, counts: list[int], text: int, seed: int = 0) -> None:
    """Random bytes in every buffer of a slot, and counts."""
    random = np.random.default_rng(seed)
    for buffer in cache.buffers.values():
        row = buffer[slot]
        row.view(np.uint8)[...] = random.integers(0, 256, row.view(np.uint8).shape)
    cache.visual_count[slot, : len(counts)] = counts
    cache.text_count[slot] = text


def test_capacity_is_whole_groups_and_at_least_one() -> None:
    assert PackedCache(manifest().layout, 1, 0, 8).visual_capacity == GROUP
    assert PackedCache(manifest().layout, 1, GROUP + 1, 8).visual_capacity == 2 * GROUP
    cache = PackedCache(manifest(bits=2).layout, 3, 2 * GROUP, 8)
    assert cache.buffers["1.visual_key"].shape == (3, 2, 2, 2, 128, 2)
    assert cache.buffers["1.visual_value_params"].shape == (3, 2, 2, 2, 64)
    assert cache.buffers["0.text_value"].shape == (3, 2, 8, 64)
    assert cache.visual_count.shape == (3, 2)


def test_sixteen_bits_keep_pictures_among_the_text() -> None:
    cache = PackedCache(manifest(bits=16).layout, 2, 300, 20)
    assert (cache.visual_capacity, cache.groups, cache.text_capacity) == (0, 0, 320)
    assert cache.buffers["0.visual_key"].size == 0
    assert cache.visual_count.shape == (2, 0)
    assert cache.demand((160, 160), 7) == (0, 327)
    cache.check_capacity(None, 0, 320)
    with pytest.raises(CapacityError, match="16 bits"):
        cache.check_capacity(None, 0, 321)


@pytest.mark.parametrize(("slots", "visual", "text"), [(0, 1, 1), (1, -1, 1), (1, 1, 0)])
def test_refuses_senseless_sizes(slots: int, visual: int, text: int) -> None:
    with pytest.raises(CapacityError, match="at least"):
        PackedCache(manifest().layout, slots, visual, text)


def test_slots_are_taken_and_given_back() -> None:
    cache = PackedCache(manifest().layout, 3, GROUP, 8)
    assert [cache.acquire(), cache.acquire()] == [0, 1]
    assert cache.free_slots == (2,)
    cache.text_count[0] = 5
    cache.visual_count[0] = 7
    cache.release(0)
    assert cache.free_slots == (0, 2)
    assert cache.length(0) == 0
    assert [cache.acquire(), cache.acquire()] == [0, 2]
    with pytest.raises(CapacityError, match=r"all 3 slots.*slots="):
        cache.acquire()


def test_lengths_count_valid_tokens_only() -> None:
    cache = PackedCache(manifest().layout, 2, 3 * GROUP, 50)
    cache.visual_count[1] = [128, 32, 0]
    cache.text_count[1] = 11
    assert cache.group_count(1) == 2
    assert (cache.visual_tokens(1), cache.text_tokens(1), cache.length(1)) == (160, 11, 171)
    assert cache.length(0) == 0
    cache.reset(1)
    assert cache.length(1) == 0


def test_commit_tells_visual_from_text_at_sixteen_bits() -> None:
    cache = PackedCache(manifest(bits=16).layout, 3, 200, 50)
    none = np.zeros((3, 0), np.int32)
    rows = [
        Row(2, np.array([*[IMAGE] * 160, 7, 7, 7, 7]), (160,)),
        Row(-1, np.zeros(0, int)),
        Row(0, np.array([7, 7, 7, 7])),
    ]
    call = build_call(rows, group_size=GROUP, image_token_id=IMAGE)
    cache.commit(call, none, np.array([4, 0, 164], np.int32))
    assert cache.next_position.tolist() == [4, 0, 164]
    assert (cache.visual_tokens(2), cache.text_tokens(2), cache.length(2)) == (160, 4, 164)
    assert (cache.visual_tokens(0), cache.text_tokens(0)) == (0, 4)
    assert cache.visual_tokens(1) == 0
    assert cache.visual_bytes_used(2) == 160 * cache.layout.text_bytes_per_token
    assert cache.bytes_used(2) == 164 * cache.layout.text_bytes_per_token


@pytest.mark.parametrize("bits", [1, 16])
def test_windows_start_at_the_first_token_that_is_near_enough(bits: int) -> None:
    """Calls of a picture and text, in two slots; each start is compared with the positions of all that is cached."""
    window, rng = 150, np.random.default_rng(bits)
    made = manifest(bits)
    layers = tuple(replace(layer, sliding_window=window) for layer in made.model.layers)
    layout = CacheLayout(replace(made.model, layers=layers), made.quantization)
    cache = PackedCache(layout, 3, 6 * GROUP, 900)
    stored: dict[int, list[tuple[str, int, int]]] = {0: [], 2: []}  # kind, place in the cache, position
    for pictures in ((100,), (), (130, 7), (), (3,)):
        rows = []
        for slot in (2, 0):
            ids = [int(i) for i in rng.integers(5, 9, rng.integers(1, 60))]
            for length in pictures:
                ids += [IMAGE] * length + [7] * int(rng.integers(0, 9)) if slot else []
            rows.append(cache.row(slot, np.array(ids), pictures if slot else ()))
        call = build_call(rows, group_size=GROUP, image_token_id=IMAGE)
        assert call.window_start is not None
        visual_count, text_count = cache.visual_count.copy(), cache.text_count.copy()
        for b, row in enumerate(rows):
            known, before = stored[row.slot], row.position
            for i in range(len(row.token_ids)):
                for kind, start in zip(("visual", "text"), call.window_start[b, :, i], strict=True):
                    near = {place for k, place, position in known if k == kind and before + i - position < window}
                    assert near == {place for k, place, _ in known if k == kind and place >= start}
            assert (
                call.window_start[b, :, len(row.token_ids) :]
                == call.window_start[b, :, len(row.token_ids) - 1 :][:, :1]
            ).all()
            text = call.text_index[b][call.text_index[b] >= 0].tolist()
            entries = call.visual_index[b].tolist()
            if bits == 16:
                text, entries = sorted(text + [i for i in entries if i >= 0]), []
            first = cache.group_count(row.slot)
            known += [("text", int(text_count[row.slot]) + n, before + i) for n, i in enumerate(text)]
            known += [("visual", first * GROUP + n, before + i) for n, i in enumerate(entries) if i >= 0]
            text_count[row.slot] += len(text)
            counts = [c for c in np.count_nonzero(np.reshape(entries, (-1, GROUP)) >= 0, axis=1) if c]
            visual_count[row.slot, first : first + len(counts)] = counts
        cache.commit(call, visual_count, text_count)
    cache.fork(2, 1)
    again = np.array([7])
    ours, theirs = (cache.row(slot, again).window_start for slot in (1, 2))
    assert ours is not None
    assert theirs is not None
    assert ours.tolist() == theirs.tolist()
    assert ours.max() > 0


def test_capacity_errors_say_what_helps() -> None:
    cache = PackedCache(manifest().layout, 1, 3 * GROUP, 20)
    cache.visual_count[0, :2] = [128, 32]
    cache.text_count[0] = 15
    cache.check_capacity(0, 1, 5)
    with pytest.raises(CapacityError, match=r"2 groups of 128 .* 1 of 3 free.*--max-visual-tokens\) to at least 512"):
        cache.check_capacity(0, 2, 0)
    with pytest.raises(CapacityError, match=r"6 text tokens.* 5 of 20 free.*--max-text-tokens\) by at least 1"):
        cache.check_capacity(0, 0, 6)
    cache.check_capacity(None, 3, 20)
    assert cache.demand((160, 1), 4) == (3, 4)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_bytes_are_those_of_the_buffers(bits: int, dtype: str) -> None:
    cache = PackedCache(manifest(bits, dtype=dtype).layout, 2, 3 * GROUP, 50)
    arrays = [*cache.buffers.values(), cache.visual_count, cache.text_count]
    assert cache.allocated_bytes == sum(array.nbytes for array in arrays)
    if bits != 16:
        cache.visual_count[0] = [128, 128, 3]
        visual = [name for name in cache.buffers if ".visual" in name]
        assert cache.visual_bytes_used(0) == sum(cache.buffers[name][0].nbytes for name in visual)
    cache.text_count[0] = cache.text_capacity
    assert cache.bytes_used(0) == sum(buffer[0].nbytes for buffer in cache.buffers.values())


def test_a_picture_of_576_tokens_at_one_bit_takes_a_twelfth() -> None:
    cache = PackedCache(manifest(1, group_size=640).layout, 1, 576, 8)
    cache.visual_count[0, 0] = 576
    sixteen = 576 * 2 * 2 * 2 * 64 * 2  # tokens, key and value, layers, heads, channels, bytes
    assert cache.visual_bytes_used(0) * 12 <= sixteen
    assert sum(cache.buffers[name].nbytes for name in cache.buffers if ".visual" in name) * 12 <= sixteen


def test_text_rows_of_8_bits() -> None:
    """Rows of words, forked and loaded as they are, whatever the model's type."""
    facts = manifest(dtype="bfloat16")
    layout = CacheLayout(facts.model, replace(facts.quantization, text_bits=8))
    cache, other = (PackedCache(layout, 2, GROUP, 20) for _ in range(2))
    fill(cache, 0, [128], 7)
    assert cache.buffers["1.text_key"].dtype == np.int32
    assert cache.bytes_used(0) == cache.visual_bytes_used(0) + 7 * 2 * 2 * 2 * 68  # layers, kinds, heads
    cache.fork(0, 1)
    other.load(cache)
    for name in ("0.text_key", "1.text_value"):
        assert np.array_equal(other.buffers[name][1, :, :7], cache.buffers[name][0, :, :7])


@pytest.mark.parametrize("slots", [1 << 40, 1 << 60])
def test_more_than_main_memory_holds(slots: int) -> None:
    with pytest.raises(CapacityError, match=r"no room .*; lower slots="):
        PackedCache(manifest().layout, slots, GROUP, 8)


@pytest.mark.parametrize("bits", [1, 4, 16])
def test_fork_copies_what_is_valid_and_nothing_else(bits: int) -> None:
    cache = PackedCache(manifest(bits).layout, 4, 4 * GROUP, 60)
    counts = [] if bits == 16 else [128, 32]
    for slot in range(4):
        fill(cache, slot, counts if slot == 2 else [], 13 if slot == 2 else 0, seed=slot)
    before = {name: buffer.copy() for name, buffer in cache.buffers.items()}
    cache.fork(2, 1)
    assert cache.length(1) == cache.length(2) == (13 if bits == 16 else 173)
    for name, buffer in cache.buffers.items():
        used = 13 if "text" in name else 0 if bits == 16 else 2  # tiles and groups coincide here
        raw, old = buffer.view(np.uint8), before[name].view(np.uint8)
        np.testing.assert_array_equal(raw[1, :, :used], old[2, :, :used])
        np.testing.assert_array_equal(raw[1, :, used:], old[1, :, used:])
        np.testing.assert_array_equal(raw[[0, 2, 3]], old[[0, 2, 3]])
    cache.reset(2)
    assert cache.length(1) == (13 if bits == 16 else 173)


def test_storage_may_be_elsewhere() -> None:
    class Recorder(HostStorage):
        copies = 0

        def allocate(self, dtype: str, shape: Shape) -> list[np.ndarray]:  # type: ignore[override]
            return [super().allocate(dtype, shape)]

        def copy(self, buffer: list[np.ndarray], source: int, target: int, entries: int) -> None:  # type: ignore[override]
            self.copies += 1
            super().copy(buffer[0], source, target, entries)

        def read(self, buffer: list[np.ndarray], row: int | None = None) -> np.ndarray:  # type: ignore[override]
            return super().read(buffer[0], row)

    storage = Recorder()
    cache = PackedCache(manifest().layout, 2, GROUP, 8, storage)
    cache.text_count[0] = 3
    cache.read("1.text_key")[0, :, :3] = 2
    cache.fork(0, 1)
    assert storage.copies == 4  # text keys and values of two layers
    assert (cache.read("1.text_key")[1, :, :3] == 2).all()
    assert (cache.read("1.text_key", 1)[:, :3] == 2).all()


def test_states_of_linear_attention_are_forked_whole() -> None:
    made = manifest()
    linear = LayerInfo(0, 0, 0.0, linear=LinearInfo(conv_channels=6, conv_width=3, heads=2, key_dim=4, value_dim=5))
    layout = CacheLayout(replace(made.model, layers=(linear, *made.model.layers)), made.quantization)
    cache = PackedCache(layout, 3, GROUP, 8)
    fill(cache, 0, [GROUP], 2)
    cache.fork(0, 2)
    for name in ("0.conv_state", "0.recurrent_state"):
        buffer = cache.buffers[name]
        np.testing.assert_array_equal(buffer[2], buffer[0])
        assert not buffer[1].any()
    np.testing.assert_array_equal(cache.buffers["1.text_key"][2, :, :2], cache.buffers["1.text_key"][0, :, :2])
    assert not cache.buffers["1.text_key"][2, :, 2:].any()
    assert cache.bytes_used(0) == layout.bytes_per_group + 2 * layout.text_bytes_per_token + layout.state_bytes
    assert cache.bytes_used(1) == 0
    other = PackedCache(layout, 3, GROUP, 8)
    other.load(cache)
    np.testing.assert_array_equal(other.buffers["0.recurrent_state"], cache.buffers["0.recurrent_state"])
