"""The arrays of a call."""

from __future__ import annotations

import numpy as np
import pytest

from vkvx.errors import InputError
from vkvx.runtime.calls import Call, Row, build_call, place_embeds

IMAGE, SIZE = 9, 4


def ids(pattern: str) -> np.ndarray:
    """``v`` is a visual token, any other character a text token."""
    return np.array([IMAGE if mark == "v" else 100 + number for number, mark in enumerate(pattern)], np.int32)


def call_of(*rows: Row) -> Call:
    return build_call(rows, group_size=SIZE, image_token_id=IMAGE)


def test_a_picture_is_padded_to_groups_and_rows_to_the_longest() -> None:
    call = call_of(
        Row(5, ids("tvvvvvt"), (5,), 0),
        Row(0, ids("tt"), (), 30),
        Row(2, ids("vvtvvvt"), (2, 3), 7),
    )
    none = -1
    assert call.input_ids.shape == call.position_ids.shape == (3, 7)
    assert call.visual_index.tolist() == [
        [1, 2, 3, 4, 5, none, none, none],
        [none] * 8,
        [0, 1, none, none, 3, 4, 5, none],
    ]
    assert call.visual_rows.tolist() == [
        [0, 1, 2, 3, 4, none, none, none],
        [none] * 8,
        [5, 6, none, none, 7, 8, 9, none],
    ]
    assert call.text_index.tolist() == [[0, 6], [0, 1], [2, 6]]
    assert call.last_index.tolist() == [6, 1, 6]
    assert call.slot.tolist() == [5, 0, 2]
    assert call.position_ids[0].tolist() == list(range(7))
    assert call.position_ids[1, :2].tolist() == [30, 31]
    assert call.position_ids[2].tolist() == list(range(7, 14))
    assert call.input_ids[1].tolist() == [100, 101, 0, 0, 0, 0, 0]
    assert all(array.dtype == np.int32 for array in vars(call).values() if array is not None)


def test_without_pictures_there_are_no_visual_entries() -> None:
    call = call_of(Row(1, ids("t"), (), 4), Row(0, ids("t"), (), 9))
    assert call.visual_index.shape == (2, 0)
    assert call.text_index.tolist() == [[0], [0]]
    assert call.position_ids.tolist() == [[4], [9]]
    assert place_embeds(call, np.ones((3, 2), np.float16)).shape == (2, 0, 2)


def test_a_call_of_pictures_only_has_no_text() -> None:
    call = call_of(Row(0, ids("vvvv"), (4,)))
    assert call.text_index.shape == (1, 0)
    assert call.visual_index.tolist() == [[0, 1, 2, 3]]


def test_an_idle_row_takes_part_in_nothing() -> None:
    call = call_of(Row(-1, np.zeros(0, np.int32)), Row(3, ids("tt")))
    assert call.slot.tolist() == [-1, 3]
    assert call.last_index.tolist() == [0, 1]
    assert call.text_index.tolist() == [[-1, -1], [0, 1]]


@pytest.mark.parametrize("pattern", ["tvt", "tvvvt", "tt"])
def test_refuses_pictures_that_do_not_match_the_tokens(pattern: str) -> None:
    with pytest.raises(InputError, match="its pictures have 2"):
        call_of(Row(0, ids(pattern), (2,)))


def test_embeddings_go_where_the_index_says() -> None:
    call = call_of(Row(0, ids("vvvvv"), (5,)), Row(1, ids("tv"), (1,)))
    embeds = np.arange(1, 13, dtype=np.float16).reshape(6, 2)
    placed = place_embeds(call, embeds)
    assert placed.dtype == np.float16
    assert placed.shape == (2, 8, 2)
    np.testing.assert_array_equal(placed[0, :5], embeds[:5])
    np.testing.assert_array_equal(placed[1, 0], embeds[5])
    assert not placed[0, 5:].any()
    assert not placed[1, 1:].any()


def test_rows_are_laid_out_as_alone() -> None:
    random = np.random.default_rng(0)
    rows = [
        Row(3, ids("tvvvvvvttvt"), (6, 1), 0),
        Row(1, ids("t" * 17), (), 100),
        Row(0, ids("vvvvvvvvvvvvt"), (4, 4, 4), 3),
        Row(7, ids("t"), (), 60),
    ]
    total = sum(sum(row.picture_lengths) for row in rows)
    embeds = random.standard_normal((total, 3)).astype(np.float32)
    together, used = call_of(*rows), 0
    placed = place_embeds(together, embeds)
    for b, row in enumerate(rows):
        alone = call_of(row)
        own = sum(row.picture_lengths)
        # Positions count on over the padding.
        assert together.position_ids[b].tolist() == list(range(row.position, row.position + 17))
        for name in ("input_ids", "visual_index", "text_index"):
            mine, full = getattr(alone, name)[0], getattr(together, name)[b]
            np.testing.assert_array_equal(full[: len(mine)], mine)
            assert (full[len(mine) :] == (-1 if name.endswith("index") else 0)).all()
        if own:
            mine = place_embeds(alone, embeds[used : used + own])[0]
            np.testing.assert_array_equal(placed[b, : len(mine)], mine)
        used += own
