"""The largest batch of a memory budget, for a session and for transformers' caches: steps, first tokens, memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from benchmarks.lib import memory
from benchmarks.lib.dense import DYNAMIC, STATIC, Rival
from benchmarks.lib.serving import WAYS, Model, Rows, Setting, first_token_milliseconds, prompts_at_once
from vkvx.errors import CapacityError

CHECK_ROWS, CHECK_STEPS = 16, 4
_TRIES, _SHRINK = 6, 0.95
_LOGIT_BYTES = 16
"""Of each entry of the vocabulary, for a row: logits in two types, before a step is captured and in its graph."""
_SLACK = 1 << 28
"""For what torch's allocator holds in pieces of sizes that nobody asks for again."""
_COMPILED = 1 << 29
"""For what a compiled step of transformers holds besides: one that does not fit would be compiled again."""
_EASIER = 0.85
"""Of the largest batch of transformers, one that may be faster."""
_GROWTH = 1.03
"""A batch is tried again with more rows where so many times as many seem to fit."""

Result = TypeVar("Result")


def ours(
    model: Model, setting: Setting, budget: float, *, fill: str, chunk: int, equal: int | None, off: float, layers: int
) -> dict[str, Any]:
    """A row of results of a session in ``budget`` GB; only a note if not one request fits.

    ``fill`` says how rows are filled: by "copies" or "prompts"; ``chunk`` is that of prefills (0: none). ``equal`` is
    the rival's batch, ``off`` what transformers' logits were off by in a model of ``layers`` layers.
    """
    whole = memory.Budget(int(budget * memory.GIGA))
    slot, _ = model.slot_bytes(setting), model.metrics  # what computing these takes is none of the session's
    if not _fits(whole, model.weights + slot):
        return {"note": _too_large(model, budget)}
    alone = _tried(lambda rows: _one_row(model, setting, chunk, whole, slot), 1)
    if alone is None:
        return {"note": "one request does not fit"}
    one, taken = alone
    row = slot + _LOGIT_BYTES * model.info.vocab_size
    guess = (whole.limit() - model.weights - taken - _SLACK) // row

    def attempt(rows: int) -> dict[str, Any]:
        with whole:
            session = model.open(setting, rows, chunk=chunk)
            try:
                found = _prompts(session, rows, model) if fill == "prompts" else {}
                found |= _steps(session, rows, equal)
                found |= memory.parts(model.weights, session.backend.cache.allocated_bytes).row()
                if not whole.holds():
                    raise CapacityError("the whole process exceeds the budget")
                return found | _checked(session, min(rows, CHECK_ROWS), model, off, layers)
            finally:
                session.close()
                del session
                memory.free()

    return _largest(whole, guess, row, attempt) | one


def rival(model: Model, kind: str, budget: float) -> dict[str, Any]:
    """A row of results of one of transformers' caches in ``budget`` GB; only a note if it does not run."""
    whole = memory.Budget(int(budget * memory.GIGA))
    contender = Rival(model, kind)
    row = contender.bytes_per_row()
    if not _fits(whole, model.weights + row):
        return {"note": _too_large(model, budget)}
    try:
        contender.cache(1)
    except ImportError as error:
        return {"note": str(error).strip().partition("\n")[0]}
    with whole:
        contender.check_end(1)  # libraries make their workspaces
    memory.free()
    layers = len(model.info.caches)
    # What a layer's keys and values take once more while a step makes longer or plain ones of them.
    share = 1 + {DYNAMIC: 2, STATIC: 1}.get(kind, 8) / layers
    each = int(row * share) + _LOGIT_BYTES * model.info.vocab_size
    reserve = _COMPILED if kind == STATIC else 0
    guess = (whole.limit() - model.weights - reserve) // each

    def attempt(rows: int) -> dict[str, Any]:
        with whole:
            try:
                contender.check_end(rows)
                memory.free()
                found = _rival_steps(contender, rows)
                found["first token ms"] = round(contender.first_token_milliseconds(), 1)
                return found | memory.parts(model.weights, rows * row).row()
            finally:
                memory.free()

    return _largest(whole, guess, each, attempt)


def _rival_steps(contender: Rival, most: int) -> dict[str, Any]:
    """Steps of the batch that gives the most tokens: the largest, or one that leaves the allocator some memory.

    Caches that grow by copies give memory back and take it again at each step where hardly any is left.
    """
    found: dict[str, Any] = {}
    for rows in (most,) if contender.kind == STATIC else (most, max(1, int(_EASIER * most))):
        step = contender.milliseconds(rows)
        memory.free()
        if not found or rows / step > found["rows"] / found["greedy ms"]:
            found = {"rows": rows, **_speed("greedy", rows, step)}
    rows = found["rows"]
    if contender.kind != STATIC:  # another compilation, for the same products
        found |= _speed("sampled", rows, contender.milliseconds(rows, **WAYS["sampled"]))
        memory.free()
    return found | {"largest rows": most, "one row ms": round(contender.milliseconds(1), 3)}


def _one_row(model: Model, setting: Setting, chunk: int, whole: memory.Budget, slot: int) -> tuple[dict[str, Any], int]:
    """Times of a request that is alone, and what it takes of memory besides weights and its row of the cache."""
    with whole:
        session = model.open(setting, 1, chunk=chunk)
        try:
            found = {"first token ms": round(first_token_milliseconds(session), 1)}
            rows = Rows(session, 1)
            found["one row ms"] = round(rows.milliseconds(1), 3)
            return found, memory.allocated_peak() - model.weights - slot
        finally:
            session.close()
            del session
            memory.free()


def _prompts(session: Any, rows: int, model: Model) -> dict[str, Any]:
    """All rows filled by prompts of their own, given at the same time."""
    last, step = prompts_at_once(session, rows, model.workload.answer)
    return {"first tokens of all s": round(last, 2), "step from prompts ms": round(step, 3)}


def _steps(session: Any, count: int, equal: int | None) -> dict[str, Any]:
    rows = Rows(session, count)
    found: dict[str, Any] = {"rows": count}
    for way, options in WAYS.items():
        found |= _speed(way, count, rows.milliseconds(count, **options))
    if equal is not None and equal <= count:
        step = rows.milliseconds(equal, **WAYS["sampled"])
        found |= {"equal rows": equal, "equal step ms": round(step, 3), "equal tokens/s": round(1000 * equal / step)}
    rows.close()
    return found


def _speed(way: str, rows: int, milliseconds: float) -> dict[str, Any]:
    return {f"{way} ms": round(milliseconds, 3), f"{way} tokens/s": round(1000 * rows / milliseconds)}


def _largest(whole: memory.Budget, guess: int, row: int, attempt: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """What the largest number of rows that fits gives: from a guess on downwards, then upwards if much is left.

    ``row`` is what another row takes, in bytes.
    """
    rows, found = guess, None
    for _ in range(_TRIES):
        if rows < 1 or (found := _tried(attempt, rows)) is not None:
            break
        rows = min(rows - 1, int(rows * _SHRINK))
    if found is None:
        return {"note": f"{guess} rows and some less do not fit" if guess > 1 else "one request does not fit"}
    more = rows + whole.left() // row
    if rows == guess and more >= _GROWTH * rows:
        found = _tried(attempt, more) or found
    return found


def _tried(attempt: Callable[[int], Result], rows: int) -> Result | None:
    """What an attempt gives, None if memory does not suffice for it."""
    import torch

    try:
        return attempt(rows)
    except (CapacityError, torch.OutOfMemoryError) as error:
        print(f"{rows} rows do not fit: {str(error).partition('. ')[0]}", flush=True)
        error.__traceback__ = error.__cause__ = error.__context__ = None  # frames hold tensors
    memory.free()
    return None


def _fits(whole: memory.Budget, size: int) -> bool:
    return whole.limit() > size


def _too_large(model: Model, budget: float) -> str:
    return f"weights of {model.weights / memory.GIGA:.1f} GB and a request do not fit"


def check_logits(model: Model) -> dict[str, Any]:
    """How far logits of transformers and of ours, both at 16 bits, are from those of FP32, of their range.

    Both round as many products to the model's type, so ours may be off by twice as much at the most. Takes the model.
    """
    tokens = [10, 200, 300]
    exact = Rival(_float32(model), DYNAMIC).logits(tokens)
    theirs = Rival(model, DYNAMIC).logits(tokens)
    session = model.open(Setting(16), 1)
    rows = Rows(session, 1)
    fed = [rows.logits([[token] for token in tokens], captured=way)[:, 0] for way in (False, True)]
    session.close()
    spread = float(np.ptp(exact))
    off = [float(np.abs(found - exact[1:]).max()) / spread for found in (theirs[1:], *fed)]
    if max(off[1:]) > 2 * off[0]:
        raise SystemExit(f"logits are off by {off[1:]} of their range, those of transformers by {off[0]}")
    return dict(zip(("transformers", "eager", "captured"), (float(f"{one:.2g}") for one in off), strict=True))


def _float32(model: Model) -> Model:
    return Model(model.workload, copy.deepcopy(model.model).float())


def _checked(session: Any, count: int, model: Model, off: float, layers: int) -> dict[str, Any]:
    """Tokens of steps are the largest of eager logits, up to what these differ from captured ones.

    Where the captured logits' largest is not the eager ones', it is less by twice their difference at the most. This
    difference is bounded itself: each is off from FP32 by no more than what was found for few layers, as often as there
    are more layers.
    """
    rows = Rows(session, count)
    tokens = rows.steps(count, CHECK_STEPS)
    fed = [[10 + row for row in range(count)], *tokens[:-1]]
    eager, captured = (rows.logits(fed, captured=way) for way in (False, True))
    rows.close()
    eager[..., model.info.image_token_id] = captured[..., model.info.image_token_id] = -np.inf
    finite = np.isfinite(eager)
    difference = float(np.abs(eager[finite] - captured[finite]).max())
    spread = float(np.ptp(eager[finite]))
    bound = 2 * 2 * off * max(1.0, len(model.info.layers) / layers)
    if difference > bound * spread:
        raise SystemExit(f"captured logits differ from eager ones by {difference / spread} of their range > {bound}")
    chosen = np.take_along_axis(eager, np.array(tokens)[..., None], -1)[..., 0]
    if (short := float((eager.max(-1) - chosen).max())) > 2 * difference:
        raise SystemExit(f"a token's logit is {short} below the largest; captured logits differ by {difference}")
    return {"captured against eager": float(f"{difference / spread:.2g}")}
