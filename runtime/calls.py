"""The arrays of one call, from what each sequence feeds: which position is visual, which is text, which is padding.

The rules are those of the operator (``docs/operator.md``): entries of ``visual_index`` come in groups, a picture
starts a group and is padded with -1 to whole groups, a row's groups are a prefix, padding ends ``text_index``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vkvx.errors import InputError

CALL_INPUTS = ("input_ids", "position_ids", "visual_index", "text_index", "last_index", "slot")
"""Inputs of the decoder graph that a call brings, less ``visual_embeds``: INT32, fields of :class:`Call`."""
PADDING = {"visual_index": -1, "visual_rows": -1, "text_index": -1, "slot": -1}
"""What fields of a call hold where there is nothing, if it is not 0."""


@dataclass(frozen=True)
class Row:
    """What one sequence feeds in a call.

    ``token_ids`` is INT [n] and holds the image token id once for each visual token. ``picture_lengths`` are the visual
    tokens of each picture, in order. ``position`` is the number of tokens already in the slot. ``rotary`` INT [3, n]
    are the positions of the rotary embedding where it tells time, rows and columns apart, else None.
    ``window_start`` INT32 [2, n] is where the window of each token starts in the slot, in models that have one.
    ``other_embeds`` are how many embeddings are given for the row before and behind those that the call takes.
    """

    slot: int
    token_ids: np.ndarray
    picture_lengths: tuple[int, ...] = ()
    position: int = 0
    rotary: np.ndarray | None = None
    window_start: np.ndarray | None = None
    other_embeds: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Call:
    """The inputs of one decoder call but for embeddings and caches, all INT32.

    ``input_ids`` are [B, S], ``position_ids`` too, or [B, 4, S] with the plain index first; ``visual_index`` and
    ``visual_rows`` [B, Nv], ``text_index`` [B, Nt], ``last_index`` and ``slot`` [B]. ``visual_rows`` says which row of
    the embeddings that are given (rows' pictures one after another) belongs to which entry of ``visual_index``; both
    are -1 where there is none.
    ``next_position`` [B] is where the rotary embedding of each row's next token is. ``window_start`` [B, 2, S] are the
    first cached visual entry and the first cached text row that each position sees, in models with a sliding window.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    visual_index: np.ndarray
    text_index: np.ndarray
    last_index: np.ndarray
    slot: np.ndarray
    visual_rows: np.ndarray
    next_position: np.ndarray
    window_start: np.ndarray | None = None

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """The call's inputs of the decoder graph by name."""
        window = {} if self.window_start is None else {"window_start": self.window_start}
        return {name: getattr(self, name) for name in CALL_INPUTS} | window


def build_call(rows: Sequence[Row], *, group_size: int, image_token_id: int) -> Call:
    """Lay out the rows of one call. Raises InputError if image tokens and picture lengths of a row disagree.

    Positions count on over the padding: a graph may tell by them where in the row it is.

    A row of slot -1 without tokens is idle. S, Nv and Nt are the largest of any row; Nv is 0 if no row has a picture.
    """
    batch = len(rows)
    visual = [row.token_ids == image_token_id if row.picture_lengths else None for row in rows]
    groups = [sum(-(-length // group_size) for length in row.picture_lengths) for row in rows]
    length = max(len(row.token_ids) for row in rows)
    texts = max(len(row.token_ids) - sum(row.picture_lengths) for row in rows)
    input_ids = np.zeros((batch, length), np.int32)
    position_ids = np.zeros((batch, length), np.int32)
    rotary = np.zeros((batch, 3, length), np.int32)
    next_position = np.zeros(batch, np.int32)
    visual_index = np.full((batch, max(groups) * group_size), -1, np.int32)
    visual_rows = np.full_like(visual_index, -1)
    text_index = np.full((batch, texts), -1, np.int32)
    last_index = np.zeros(batch, np.int32)
    embedded = 0
    for b, (row, mask) in enumerate(zip(rows, visual, strict=True)):
        count = len(row.token_ids)
        position_ids[b] = np.arange(row.position, row.position + length)
        next_position[b] = row.position + count
        if count == 0:
            continue
        if row.rotary is not None:
            next_position[b] = row.rotary.max() + 1
            rotary[b, :, :count] = row.rotary
            rotary[b, :, count:] = next_position[b] + np.arange(length - count)
        input_ids[b, :count] = row.token_ids
        last_index[b] = count - 1
        if mask is None:
            text_index[b, :count] = np.arange(count)
            continue
        found = np.flatnonzero(mask)
        if len(found) != sum(row.picture_lengths):
            raise InputError(
                f"{len(found)} image tokens in the prompt, but its pictures have {sum(row.picture_lengths)}; "
                "give one placeholder a picture"
            )
        text = np.flatnonzero(~mask)
        text_index[b, : len(text)] = text
        entry = taken = 0
        embedded += row.other_embeds[0]
        for size in row.picture_lengths:
            visual_index[b, entry : entry + size] = found[taken : taken + size]
            visual_rows[b, entry : entry + size] = np.arange(embedded, embedded + size)
            taken += size
            embedded += size
            entry += -(-size // group_size) * group_size
        embedded += row.other_embeds[1]
    slot = np.array([row.slot for row in rows], np.int32)
    window_start = None
    if any(row.window_start is not None for row in rows):
        window_start = np.zeros((batch, 2, length), np.int32)
        for b, row in enumerate(rows):
            if row.window_start is not None and row.window_start.shape[1]:
                missing = length - row.window_start.shape[1]
                window_start[b] = np.pad(row.window_start, ((0, 0), (0, missing)), mode="edge")
    if any(row.rotary is not None for row in rows):
        position_ids = np.concatenate([position_ids[:, None], rotary], axis=1)
    return Call(
        input_ids, position_ids, visual_index, text_index, last_index, slot, visual_rows, next_position, window_start
    )


def decode_rows(rows: int, most: int) -> int:
    """Rows of the decode step that serves so many: the next power of two, or the most that there may be."""
    return max(rows, min(most, 1 << (rows - 1).bit_length()))


def window_starts(positions: np.ndarray, window: int, visual: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Where a window starts in what a slot holds, INT32 [2, n]: its first visual entry, and its first text row.

    ``positions`` INT [n] are those of new tokens, which see the ``window`` last ones, themselves included. ``visual``
    INT [entries] and ``text`` INT [rows] are those of what is cached; padding of a group has that of its last token.
    """
    hidden = positions - window
    return np.stack([np.searchsorted(cached, hidden, side="right") for cached in (visual, text)]).astype(np.int32)


def place_embeds(call: Call, image_embeds: np.ndarray) -> np.ndarray:
    """``visual_embeds`` [B, Nv, hidden] of a call, from the embeddings [tokens, hidden] of its pictures."""
    placed = image_embeds[np.maximum(call.visual_rows, 0)]
    placed[call.visual_rows < 0] = 0
    return placed
