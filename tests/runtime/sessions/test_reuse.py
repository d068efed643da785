"""Prompts that go on from what slots kept: the tokens of a session that keeps nothing, and fewer that are fed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cut_backend import CutBackend
from fakes import EOS, GROUP, IMAGE, FakeProcessor, manifest

from vkvx.errors import NumericError, OptionError
from vkvx.manifest import LayerInfo, LinearInfo, Manifest
from vkvx.models.pictures.base import Encoded, prompt_positions
from vkvx.models.registry import sample_pages
from vkvx.runtime.sessions.generation import Generation
from vkvx.runtime.sessions.pieces import check_cut_after_pictures, cut
from vkvx.runtime.sessions.processor import Prepared
from vkvx.runtime.sessions.reuse import Fed, common
from vkvx.runtime.sessions.sampling import GenerationOptions
from vkvx.runtime.sessions.scheduler import run
from vkvx.runtime.sessions.session import Session

LENGTHS = {1: GROUP, 2: 160, 3: 20, 4: 160}
"""Visual tokens of the pictures that conversations are about: whole groups, and not; some only differ in pixels."""
FORMS: dict[str, dict[str, Any]] = {
    "16 bits": {"bits": 16},
    "16 bits, pieces": {"bits": 16, "chunk": 140},
    "16 bits, linear": {"bits": 16, "linear": True},
    "16 bits, both ways": {"bits": 16, "mask": "run"},
    "packed": {"bits": 1},
    "packed, cut": {"bits": 1, "cut": True},
    "packed, cut, window": {"bits": 1, "cut": True, "window": 90},
    "packed, cut, pieces": {"bits": 1, "cut": True, "chunk": 140},
    "packed, cut, linear": {"bits": 1, "cut": True, "linear": True},
    "packed, cut, both ways": {"bits": 1, "cut": True, "mask": "run"},
    "packed, cut, rows": {"bits": 1, "cut": True, "rows": 4},
    "packed, text of 8 bits": {"bits": 1, "text": 8},
    "packed, text of 8 bits, cut": {"bits": 1, "text": 8, "cut": True},
    "packed, text of 8 bits, cut, pieces": {"bits": 1, "text": 8, "cut": True, "chunk": 140},
}


def facts(
    bits: int,
    *,
    text: int = 16,
    mask: str = "causal",
    window: int = 0,
    rows: int = 1,
    linear: bool = False,
    **_: object,
) -> Manifest:
    found = manifest(bits)
    layers = [replace(layer, visual_mask=mask, sliding_window=window) for layer in found.model.layers]
    if linear:
        layers[0] = LayerInfo(0, 0, 0.0, linear=LinearInfo(1, 4, 1, 4, 4))
    model = replace(found.model, layers=tuple(layers), position_rows=rows)
    return replace(found, model=model, quantization=replace(found.quantization, text_bits=text))


class Backend(CutBackend):
    """Pictures have different lengths. States of linear attention hold all that they were fed."""

    def encode(self, pixel_inputs):  # type: ignore[no-untyped-def]
        picture = int(pixel_inputs["pixel_values"][0, 0])
        embeds = np.zeros((LENGTHS[picture], 8), np.float32)
        embeds[:, 0], embeds[:, 1] = picture, np.arange(len(embeds)) + 1
        return embeds

    def step(self, call, visual_embeds):  # type: ignore[no-untyped-def]
        if self.manifest.model.linear_layers:
            for slot in call.slot.tolist():
                assert self.cache.length(slot) in (0, len(self.held[slot])), "a state cannot go back"
        return super().step(call, visual_embeds)


def opened(form: dict[str, Any], *, reuse: bool, slots: int, samples: bool) -> Session:
    made = facts(**form)
    backend = Backend(made, slots, visual_tokens=2048, text_tokens=2048)
    backend.samples = samples
    return Session(
        *(made, backend, FakeProcessor(), "", form.get("chunk")),  # type: ignore[arg-type]
        cut_after_pictures=bool(form.get("cut")),
        reuse=reuse,
    )


def prompt(parts: Sequence[int | list[int]], rows: int = 1) -> Prepared:
    """Of tokens and numbers of pictures."""
    ids, pictures = list[int](), [part for part in parts if isinstance(part, int)]
    for part in parts:
        ids += [IMAGE] * LENGTHS[part] if isinstance(part, int) else part
    calls = tuple({"pixel_values": np.full((1, 1), picture, np.float32)} for picture in pictures)
    encoded = [
        Encoded(call, LENGTHS[picture], "", np.stack(np.unravel_index(np.arange(LENGTHS[picture]), (1, 16, 10))))
        for picture, call in zip(pictures, calls, strict=True)
    ]
    found = np.array(ids, np.int32)
    positions = prompt_positions(found == IMAGE, encoded) if rows > 1 else None
    digests = tuple(one.digest for one in encoded)
    return Prepared(found, calls, tuple(LENGTHS[one] for one in pictures), positions, picture_digests=digests)


def answers(session: Session, prompts: Sequence[Prepared], options: Sequence[GenerationOptions]) -> list[Generation]:
    requests = [session.request(row, *one) for row, one in enumerate(zip(prompts, options, strict=True))]
    free = session.backend.cache.free_slots
    found = {chunk.row: chunk.generation for chunk in run(session.backend, requests, session.prefill_chunk)}
    assert session.backend.cache.free_slots == free
    return [one for _, one in sorted(found.items()) if one is not None]


def words(rng: random.Random, least: int, most: int) -> list[int]:
    return [rng.randrange(60, 90) for _ in range(rng.randint(least, most))]


@pytest.mark.parametrize("name", FORMS)
def test_random_conversations_get_the_same_tokens(name: str) -> None:
    """72 conversations, each turn of which comes with its whole history, as over HTTP; they change turns and fork."""
    form, rng = FORMS[name], random.Random(name)
    systems = [words(rng, 10, 50) for _ in range(2)]
    systems.append(systems[0][:20] + words(rng, 10, 20))
    questions = [words(rng, 1, 30) for _ in range(4)]
    slots, samples = rng.randint(1, 3), rng.random() < 0.5
    on, off = (opened(form, reuse=reuse, slots=slots, samples=samples) for reuse in (True, False))
    running, requests, saved = list[list[int | list[int]]](), 0, 0
    for _ in range(72):
        running.append([[1, *rng.choice(systems)]])
        running = running[-4:]
        for _ in range(rng.randint(1, 2)):
            chosen = [rng.choice(running) for _ in range(rng.randint(1, 2))]
            asked = []
            for history in chosen:
                pictures = [rng.choice((1, 2, 3, 4)) for _ in range(rng.choice((0, 1, 1, 2)))]
                between = [] if rng.random() < 0.5 else [words(rng, 1, 2)]
                inside = [part for picture in pictures for part in (picture, *between)]
                asked.append([*history, *inside, rng.choice(questions)][:9])
            options = [
                GenerationOptions(
                    max_new_tokens=rng.randint(1, 6),
                    temperature=rng.choice((0.0, 1.0)),
                    seed=rng.randrange(99),
                    ignore_eos=rng.random() < 0.7,
                    logprobs=True,
                )
                for _ in chosen
            ]
            prompts = [prompt(parts, form.get("rows", 1)) for parts in asked]
            alone, reused = answers(off, prompts, options), answers(on, prompts, options)
            for a, b in zip(alone, reused, strict=True):
                assert (a.token_ids, a.logprobs, a.prompt_tokens) == (b.token_ids, b.logprobs, b.prompt_tokens)
                assert a.reused_tokens == 0
                requests, saved = requests + 1, saved + b.reused_tokens
            for history, parts, answer in zip(chosen, asked, alone, strict=True):
                history[:] = [*parts, list(answer.token_ids), [EOS] * (answer.token_ids[-1] != EOS), words(rng, 1, 3)]
    assert on.kept is not None
    assert saved == on.kept.tokens
    fed, fed_alone = on.backend.fed, off.backend.fed  # type: ignore[attr-defined]
    assert abs(fed_alone - saved - fed) <= requests  # where an end is noticed late, one more may be fed
    if name == "packed, text of 8 bits":  # a prompt is one call, which ends where it does
        assert saved == 0
        return
    least = {"packed": 0.02, "16 bits, linear": 0.05, "packed, cut, linear": 0.05}.get(name, 0.2)
    assert saved > least * fed_alone
    assert on.kept.hits > requests / 10


SYSTEM, PICTURED = [1, *range(60, 90)], {"bits": 1, "cut": True}
SHORT = GenerationOptions(max_new_tokens=3, temperature=0.0, ignore_eos=True)


def test_the_cut_is_behind_the_last_picture_of_each_turn() -> None:
    made = facts(1)
    turns = prompt([SYSTEM, 1, [60], 3, [61, 62], [EOS], [63], 2, [EOS], [64, 65], [EOS], 4])

    def ends(after: bool, limit: int | None = None) -> list[int]:
        return [piece.end for piece in cut(turns.token_ids, turns.picture_lengths, made, limit, after)]

    first = len(SYSTEM) + GROUP + 1 + 20
    second = first + 2 + 1 + 1 + 160
    assert ends(False) == [len(turns.token_ids)]
    assert ends(True) == [first, second, len(turns.token_ids)]  # the last picture ends the prompt
    pieces = cut(turns.token_ids, turns.picture_lengths, made, 170, True)
    assert {first, second} <= {piece.end for piece in pieces}
    assert all(len(piece) <= 170 for piece in pieces)
    assert sum(pieces[-1].picture_lengths) + pieces[-1].first_embed == sum(turns.picture_lengths)


def test_models_and_bundles_that_cannot_be_cut_say_so() -> None:
    check_cut_after_pictures(facts(1), True)
    check_cut_after_pictures(facts(16), False)
    with pytest.raises(OptionError, match="at 16 bits they are reused without, so leave it out"):
        check_cut_after_pictures(facts(16), True)
    with pytest.raises(OptionError, match="see themselves both ways; leave it out"):
        check_cut_after_pictures(facts(1, mask="prefix"), True)


def test_a_second_question_feeds_neither_picture_nor_system_prompt() -> None:
    session = opened(PICTURED, reuse=True, slots=4, samples=False)
    encoded, encode = list[int](), session.backend.encode
    session.backend.encode = lambda pixels: (encoded.append(1), encode(pixels))[1]  # type: ignore[method-assign, func-returns-value]
    for question, reused, pictures in (([91] * 5, 0, 1), ([92] * 9, len(SYSTEM) + GROUP, 1)):
        (answer,) = answers(session, [prompt([SYSTEM, 1, question])], [SHORT])
        assert (answer.reused_tokens, len(encoded)) == (reused, pictures)
        assert answer.prompt_tokens == len(SYSTEM) + GROUP + len(question)
        assert answer.visual_tokens == GROUP
    (answer,) = answers(session, [prompt([SYSTEM, 1, [91] * 5, 3, [91] * 5])], [SHORT])
    assert answer.reused_tokens == len(SYSTEM), "the first turn has its cut elsewhere with a second picture"
    assert len(encoded) == 3
    (answer,) = answers(session, [prompt([SYSTEM, 1, [91] * 5, [EOS], 3, [91] * 5])], [SHORT])
    assert (answer.reused_tokens, len(encoded)) == (len(SYSTEM) + GROUP + 5, 4)


def test_the_least_recently_used_goes_first_and_a_part_is_copied() -> None:
    session = opened({"bits": 16}, reuse=True, slots=3, samples=False)
    cache, starts = session.backend.cache, [[1, *[60 + i] * 40] for i in range(4)]

    def ask(start: list[int], *more: int) -> int:
        (answer,) = answers(session, [prompt([[*start, *more]])], [SHORT])
        return answer.reused_tokens

    assert [ask(start, 90) for start in starts[:3]] == [0, 0, 0]
    assert cache.kept_slots == (0, 1, 2)
    assert ask(starts[0], 91) == 41  # a copy, in place of the second
    assert cache.kept_slots == (2, 0, 1)
    assert ask(starts[1], 91) == 0  # in place of the third
    assert cache.kept_slots == (0, 1, 2)
    assert ask(starts[0], 90, 91) == 42  # the first is still there, and what followed it, too
    with session.conversation() as conversation:  # takes the oldest
        assert conversation.slot == 2
        assert ask(starts[0], 91) == 41
    assert cache.free_slots == (0, 1, 2)
    assert session.kept is not None
    assert (session.kept.hits, session.kept.tokens) == (3, 124)


def test_requests_that_leave_before_they_are_fed_drive_nothing_out() -> None:
    """Their slots are the first to be taken again, whatever others were given back before them."""
    session = opened({"bits": 16}, reuse=True, slots=2, samples=False)
    (first,) = answers(session, [prompt([SYSTEM])], [SHORT])
    leaving = session.request(0, prompt([[1, *[70] * 40]]), SHORT)
    leaving.admit()
    leaving.leave(keep=True)
    assert session.backend.cache.kept_slots == (0,)
    answers(session, [prompt([[1, *[80] * 40]])], [SHORT])
    (again,) = answers(session, [prompt([SYSTEM])], [SHORT])
    assert (again.reused_tokens, again.token_ids) == (len(SYSTEM) - 1, first.token_ids)


def test_one_slot_goes_on_in_place() -> None:
    session = opened({"bits": 16}, reuse=True, slots=1, samples=False)
    first = prompt([SYSTEM, 2, [91] * 4])
    (answer,) = answers(session, [first], [SHORT])
    (answer,) = answers(session, [prompt([SYSTEM, 2, [91] * 4, list(answer.token_ids), [EOS, 92]])], [SHORT])
    assert answer.reused_tokens == len(SYSTEM) + 160 + 4 + 2  # the last token of an answer was not fed
    (answer,) = answers(session, [first], [SHORT])
    assert answer.reused_tokens == len(SYSTEM) + 160 + 3  # one is fed, for its logits
    alone = opened({"bits": 16}, reuse=False, slots=1, samples=False)
    assert answer.token_ids == answers(alone, [first], [SHORT])[0].token_ids


def test_what_failed_is_not_kept() -> None:
    session = opened({"bits": 16}, reuse=True, slots=2, samples=False)
    session.backend._logits = lambda held: np.full(256, np.nan, np.float32)  # type: ignore[attr-defined]
    for _ in range(2):
        with pytest.raises(NumericError):
            answers(session, [prompt([[*SYSTEM, 93]])], [SHORT])
    assert session.backend.cache.kept_slots == ()


def test_pixels_types_shapes_and_positions_tell_prompts_apart() -> None:
    pixels = np.arange(6, dtype=np.float32).reshape(2, 3)
    kinds = [pixels, pixels.astype(np.float64), pixels.reshape(3, 2), pixels + 1, np.float16(pixels)]
    digests = [Encoded({"pixel_values": one}, 1, "").digest for one in kinds]
    digests.append(Encoded({"pixels": pixels}, 1, "").digest)
    assert len({*digests, Encoded({"pixel_values": pixels.copy()}, 1, "").digest}) == 6
    made = facts(1, rows=4)
    first = prompt([SYSTEM, 1, [91] * 30], rows=4)
    assert first.positions is not None
    moved = replace(first, positions=first.positions + (np.arange(len(first.token_ids)) > 50))
    unknown = replace(first, picture_digests=())
    pieces = cut(first.token_ids, first.picture_lengths, made, None, True)
    fed, other = (Fed.of_prompt(one, pieces, made) for one in (first, moved))
    assert fed is not None
    assert other is not None
    assert Fed.of_prompt(unknown, pieces, made) is None
    assert common(fed, fed, made) == len(first.token_ids) - 1
    assert common(fed, other, made) == len(SYSTEM), "a picture is reused as a whole"
    assert common(fed, fed, facts(1, rows=4, mask="prefix")) == 0


@pytest.mark.parametrize("bits", [1, 16])
def test_a_model_answers_the_same(bits: int, bundle_factory: Callable[..., Path]) -> None:
    """Three questions about a page, of which the second has the first answer before it."""
    bundle, page = bundle_factory(bits=bits), sample_pages()[0]
    found = list[list[Generation]]()
    with Session.load(bundle, provider="cpu", slots=2, verify=False, cut_after_pictures=bits == 1) as session:
        for kept in (session.kept, None):
            session.kept = kept
            asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Transcribe the page."}]}]
            first = session.generate(session.format(asked), page, max_new_tokens=8)
            more = [{"role": "assistant", "content": first.text}, {"role": "user", "content": "What is at row 1?"}]
            turn = session.generate(session.format([*asked, *more]), page, max_new_tokens=8)
            other = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read row 2."}]}]
            found.append([first, turn, session.generate(session.format(other), page, max_new_tokens=8)])
    assert [one.token_ids for one in found[0]] == [one.token_ids for one in found[1]]
    assert [one.reused_tokens for one in found[1]] == [0, 0, 0]
    first, turn, again = found[0]
    assert first.reused_tokens == 0
    assert turn.reused_tokens > first.prompt_tokens, "the answer is not fed again"
    assert again.reused_tokens > first.visual_tokens, "the page is not fed again"
