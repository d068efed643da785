"""Long prompts in pieces: where they are cut, and what happens between and within them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import GROUP, IMAGE, PICTURE_TOKENS, FakeBackend, FakeParts, FakeProcessor, manifest

from vkvx.errors import BatchError, CapacityError, OptionError, RequestCancelledError
from vkvx.manifest import LayerInfo, LinearInfo, Manifest
from vkvx.runtime.calls import Row, build_call, place_embeds
from vkvx.runtime.engines.manifest import Limits
from vkvx.runtime.serving.server import Server
from vkvx.runtime.sessions.generation import Chunk, Request
from vkvx.runtime.sessions.pieces import check_prefill_chunk, cut
from vkvx.runtime.sessions.processor import Prepared
from vkvx.runtime.sessions.sampling import GenerationOptions
from vkvx.runtime.sessions.scheduler import Scheduler
from vkvx.runtime.sessions.session import Session

PROMPT, PICTURES = "before<image><image>, between <image> and behind them all.", [1.0, 4.0, 2.0]


@pytest.fixture(autouse=True, params=[0, 1, 3], ids=["host", "ahead", "parts"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many parts prompts are launched in, where the backend chooses tokens; 0 where the host does."""
    monkeypatch.setattr(FakeBackend, "samples", request.param > 0)
    monkeypatch.setattr(FakeBackend, "parts", request.param)
    return int(request.param)


def session(slots: int = 1, bits: int = 1, chunk: int | None = GROUP, base: Manifest | None = None) -> Session:
    fake = base or manifest(bits)
    backend: Any = FakeBackend(fake, slots)
    return Session(fake, backend, FakeProcessor(), prefill_chunk=chunk)  # type: ignore[arg-type]


def backend_of(loaded: Session) -> FakeBackend:
    assert isinstance(loaded.backend, FakeBackend)
    return loaded.backend


def masked(mask: str, bits: int = 1) -> Manifest:
    base = manifest(bits)
    layers = tuple(replace(layer, visual_mask=mask) for layer in base.model.layers)
    return replace(base, model=replace(base.model, layers=layers))


def linear() -> Manifest:
    base = manifest()
    layers = (base.model.layers[0], LayerInfo(0, 0, 0.0, linear=LinearInfo(*[2] * 5)))
    one = {name: value[:1] for name, value in vars(base.quantization).items() if isinstance(value, tuple)}
    return replace(base, model=replace(base.model, layers=layers), quantization=replace(base.quantization, **one))


def random_prompt(random: np.random.Generator) -> tuple[np.ndarray, tuple[int, ...]]:
    """Pictures of any size among text, some with text between their own tokens."""
    parts, lengths = [], []
    for _ in range(int(random.integers(0, 4))):
        parts.append(random.integers(4, 99, int(random.integers(0, 90))))
        length = int(random.integers(1, 400))
        tokens = np.full(length, IMAGE)
        if random.random() < 0.5:
            tokens = np.insert(tokens, np.sort(random.integers(1, length + 1, 9)), 7)
        parts.append(tokens)
        lengths.append(length)
    parts.append(random.integers(4, 99, int(random.integers(1, 200))))
    return np.concatenate(parts).astype(np.int32), tuple(lengths)


def groups_of(ids: np.ndarray, lengths: tuple[int, ...], first: int = 0) -> list[list[int]]:
    """Positions of the tokens of each group, as a call lays them out, counted from ``first``."""
    call = build_call([Row(0, ids, lengths)], group_size=GROUP, image_token_id=IMAGE)
    groups = call.visual_index.reshape(-1, GROUP)
    return [(group[group >= 0] + first).tolist() for group in groups if (group >= 0).any()]


@pytest.mark.parametrize("mask", ["causal", "run"])
@pytest.mark.parametrize("bits", [1, 16])
def test_pieces_are_as_long_as_may_be(mask: str, bits: int) -> None:
    """All places where a cut would be wrong are found one by one: by the groups of the whole prompt, and by runs."""
    random, facts, pieces_seen = np.random.default_rng(bits), masked(mask, bits), 0
    for _ in range(40):
        ids, lengths = random_prompt(random)
        limit = int(random.integers(GROUP, 500))
        pieces = cut(ids, lengths, facts, limit)
        wrong = set[int]()
        if bits == 1:
            for group in groups_of(ids, lengths):
                wrong.update(range(group[0] + 1, group[-1] + 1))
        if mask == "run":
            wrong.update(at for at in range(1, len(ids)) if lengths and ids[at] == ids[at - 1] == IMAGE)
        assert [piece.start for piece in pieces] == [0, *(piece.end for piece in pieces[:-1])]
        assert pieces[-1].end == len(ids)
        for piece in pieces:
            assert piece.end not in wrong
            later = [at for at in range(piece.end + 1, len(ids) + 1) if at not in wrong]
            assert len(piece) <= limit or set(range(piece.start + 1, piece.end)) <= wrong
            assert not later or later[0] - piece.start > limit  # nothing more would fit
            assert np.count_nonzero(ids[: piece.start] == IMAGE) == piece.first_embed
        if bits == 1:
            found = [
                group
                for piece in pieces
                for group in groups_of(ids[piece.start : piece.end], piece.picture_lengths, piece.start)
            ]
            assert found == groups_of(ids, lengths)
        assert sum(sum(piece.picture_lengths) for piece in pieces) == sum(lengths)
        pieces_seen += len(pieces)
    assert pieces_seen > 80
    assert cut(ids, lengths, facts, None) == cut(ids, lengths, facts, len(ids))


def test_rows_take_their_own_embeddings() -> None:
    """Two rows in one call, each with a part of the embeddings that are given for it."""
    embeds = np.arange(30, dtype=np.float32)[:, None]
    rows = [
        Row(0, np.array([5, 6])),
        Row(1, np.full(4, IMAGE), (3, 1), other_embeds=(6, 2)),  # of rows 0 to 11
        Row(2, np.array([IMAGE, 9, IMAGE]), (2,), other_embeds=(1, 15)),  # of rows 12 to 29
    ]
    call = build_call(rows, group_size=GROUP, image_token_id=IMAGE)
    placed = place_embeds(call, embeds)
    assert placed[1, [0, 1, 2, GROUP], 0].tolist() == [6, 7, 8, 9]
    assert placed[2, :2, 0].tolist() == [13, 14]
    assert np.count_nonzero(placed) == 6


@pytest.mark.parametrize("bits", [1, 16])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "seed": 5, "repetition_penalty": 1.2, "logprobs": True}])
def test_pieces_lead_to_the_same_answer(bits: int, options: dict[str, Any]) -> None:
    """The backend answers by all that a slot holds, and checks positions: alone, in batches, in turns."""
    prompts = [PROMPT, "short", "<image>" + "x" * 300, PROMPT[:30]]
    pictures: list[Any] = [PICTURES, None, [3.0], PICTURES[:2]]
    given: dict[str, Any] = {"max_new_tokens": 20, **options}
    expected = [
        session(bits=bits, chunk=None).generate(one, some, **given) for one, some in zip(prompts, pictures, strict=True)
    ]
    for slots, chunk in ((1, GROUP), (3, 130), (4, 161), (4, 400)):
        loaded = session(slots, bits, chunk)
        found = loaded.generate(prompts, pictures, **given)
        assert [(one.token_ids, one.logprobs) for one in found] == [(one.token_ids, one.logprobs) for one in expected]
        assert [one.prompt_tokens for one in found] == [one.prompt_tokens for one in expected]
        assert loaded.backend.cache.free_slots == tuple(range(slots))
        calls = backend_of(loaded).calls
        whole = GROUP + len(", between ") if bits == 1 else 0  # no part that must stay together is longer
        assert max(call.input_ids.size for call in calls) <= max(chunk, whole)
    talks = []
    for chunk in (None, GROUP):
        with session(bits=bits, chunk=chunk).conversation() as talk:
            for text, some in (("a<image>", [1.0]), (PROMPT, PICTURES), ("x" * 200, [])):
                talk.generate(text, some, **given)
            talks.append((talk.token_ids, talk.bytes_used))
    assert talks[0] == talks[1]


def test_others_go_on_between_the_pieces() -> None:
    """A row that decodes gets a token after each piece; the answer of a prompt does not begin before its last."""
    loaded, processor = session(2), FakeProcessor()
    scheduler = Scheduler(loaded.backend, GROUP)

    def submit(row: int, prompt: str, pictures: list[float], tokens: int) -> None:
        options = GenerationOptions(max_new_tokens=tokens, ignore_eos=True)
        prepared = processor.prepare(prompt, pictures)
        scheduler.submit(Request(row, prepared, options, processor, loaded.backend, prefill_chunk=GROUP))  # type: ignore[arg-type]

    submit(0, "first", [], 200)
    for _ in range(5):
        scheduler.step()
    submit(1, PROMPT, PICTURES, 3)
    seen = list[int]()
    while scheduler.busy and seen.count(1) < 3:
        for result in scheduler.step():
            assert isinstance(result, Chunk)
            seen.append(result.row)
    calls = [call.input_ids.shape for call in backend_of(loaded).calls]
    prefills = [number for number, (_, length) in enumerate(calls) if length > 1]
    assert len(prefills) == 1 + 7  # three pictures of two groups each, and the text behind
    assert all(calls[number + 1][1] == 1 for number in prefills[1:])
    assert seen.index(1) >= 6
    scheduler.close()
    assert loaded.backend.cache.free_slots == (0, 1)


@pytest.mark.parametrize("parts", [3], indirect=True)
def test_steps_run_between_the_parts_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a prompt is launched in parts; a request that looks back, or that leaves, ends it at once."""
    events, advance, step = list[str](), FakeParts.advance, FakeBackend.step

    def advancing(self: FakeParts) -> bool:
        events.append("part")
        return advance(self)

    def stepping(self: FakeBackend, call: Any, embeds: Any) -> np.ndarray:
        events.append("step" if call.input_ids.shape[1] == 1 else "prompt")
        return step(self, call, embeds)

    monkeypatch.setattr(FakeParts, "advance", advancing)
    monkeypatch.setattr(FakeBackend, "step", stepping)
    loaded, processor = session(3, chunk=None), FakeProcessor()
    expected = session(chunk=None).generate(PROMPT, PICTURES, max_new_tokens=6, ignore_eos=True)
    scheduler = Scheduler(loaded.backend)
    tokens = dict[int, list[int]]()

    def submit(row: int, prompt: str, pictures: list[float], count: int, **rules: Any) -> Request:
        options = GenerationOptions(max_new_tokens=count, ignore_eos=True, **rules)
        prepared = processor.prepare(prompt, pictures)
        request = Request(row, prepared, options, processor, loaded.backend)  # type: ignore[arg-type]
        scheduler.submit(request)
        tokens[row] = []
        return request

    def steps(count: int) -> None:
        for _ in range(count):
            for result in scheduler.step():
                assert isinstance(result, Chunk)
                tokens[result.row] += result.token_ids

    submit(0, "first", [], 500)
    steps(4)
    events.clear()
    submit(1, PROMPT, PICTURES, 6)
    steps(40)
    assert events[events.index("part") :][:7] == ["part", "step", "part", "step", "part", "prompt", "step"]
    assert tokens[1] == list(expected.token_ids)
    length = loaded.backend.cache.length(0)
    assert len(tokens[0]) >= length - len("first") - 2  # each step gave it a token, and is read but for the last
    # One that leaves: its other parts never come, and the slot is good for the next.
    events.clear()
    leaving = submit(2, PROMPT, PICTURES, 6)
    while "part" not in events:
        steps(1)
    scheduler.cancel(leaving)
    assert len(loaded.backend.cache.free_slots) == 2
    submit(3, "<image>?", [5.0], 6)
    steps(40)
    assert events.count("part") == 1 + 3
    assert tokens[3] == list(
        session(chunk=None).generate("<image>?", [5.0], max_new_tokens=6, ignore_eos=True).token_ids
    )
    # One that needs the host comes while a prompt is under way.
    events.clear()
    submit(4, PROMPT, PICTURES, 6)
    while "part" not in events:
        steps(1)
    submit(5, "again", [], 4, no_repeat_ngram_size=1)
    steps(1)
    assert events.count("part") == 3
    steps(30)
    assert tokens[4] == list(expected.token_ids)
    assert len(tokens[5]) == 4
    scheduler.close()
    assert loaded.backend.cache.free_slots == (0, 1, 2)


def test_a_request_is_cancelled_between_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = session(1)
    with Server(loaded) as server:
        step, calls = FakeBackend.step, list[int]()

        def stepping(self: FakeBackend, call: Any, embeds: Any) -> np.ndarray:
            calls.append(call.input_ids.shape[1])
            if len(calls) == 3:
                answer.cancel()
            return step(self, call, embeds)

        monkeypatch.setattr(FakeBackend, "step", stepping)
        answer = server.submit(PROMPT, PICTURES, max_new_tokens=5)
        with pytest.raises(RequestCancelledError):
            answer.result()
        ended = len(calls)
        assert 3 <= ended <= 5  # of seven
        monkeypatch.setattr(FakeBackend, "step", step)
        expected = session(chunk=None).generate("x", max_new_tokens=4)
        assert server.submit("x", max_new_tokens=4).result().token_ids == expected.token_ids
    assert loaded.backend.cache.free_slots == (0,)


class _Apart(FakeProcessor):
    """A call of the vision tower for each picture."""

    def prepare(self, prompt: str, images: Any = (), videos: object = (), **options: Any) -> Prepared:
        prepared = super().prepare(prompt, images, videos, **options)
        calls = tuple({"pixel_values": np.array([[number]], np.float32)} for number in images)
        return replace(prepared, vision_calls=calls)


def test_a_piece_that_fails_ends_its_row_only() -> None:
    """The second picture of a prompt cannot be encoded: its first is in the cache by then."""
    loaded = session(2)
    loaded.processor = _Apart()  # type: ignore[assignment]
    expected = session(chunk=None).generate("good", max_new_tokens=15)
    with pytest.raises(BatchError) as caught:
        loaded.generate(["good", PROMPT], [None, [1.0, -1.0, 2.0]], max_new_tokens=15)
    assert str(caught.value.errors[1]) == "no such picture"
    first = caught.value.generations[0]
    assert first is not None
    assert first.token_ids == expected.token_ids
    assert loaded.backend.cache.free_slots == (0, 1)
    assert max(call.input_ids.shape[1] for call in backend_of(loaded).calls) > 100  # the first picture ran


def test_pictures_are_encoded_when_their_turn_comes() -> None:
    loaded, seen = session(), list[str]()
    loaded.processor = _Apart()  # type: ignore[assignment]
    backend = backend_of(loaded)
    encode, step = backend.encode, backend.step
    backend.encode = lambda inputs: seen.append("picture") or encode(inputs)  # type: ignore[method-assign,func-returns-value]
    backend.step = lambda call, embeds: seen.append("call") or step(call, embeds)  # type: ignore[method-assign,func-returns-value]
    answer = loaded.generate(PROMPT, PICTURES, max_new_tokens=1)
    assert answer.token_ids == session(chunk=None).generate(PROMPT, PICTURES, max_new_tokens=1).token_ids
    assert seen == ["call"] + ["picture", "call", "call"] * 3


def test_an_interrupted_prompt_leaves_a_conversation_as_it_was() -> None:
    loaded = session()
    talk = loaded.conversation()
    talk.generate("a<image>", [2.0], max_new_tokens=3, ignore_eos=True)
    cache, backend = loaded.backend.cache, backend_of(loaded)
    before = (talk.token_ids, cache.length(talk.slot), cache.group_count(talk.slot), cache.bytes_used(talk.slot))
    twin = [value.copy() for value in cache.mark(talk.slot)]
    for piece in range(7):
        backend.fail_at = len(backend.calls) + piece
        with pytest.raises(KeyboardInterrupt):
            talk.generate(PROMPT, PICTURES)
        after = (talk.token_ids, cache.length(talk.slot), cache.group_count(talk.slot), cache.bytes_used(talk.slot))
        assert after == before
        assert all(np.array_equal(a, b) for a, b in zip(cache.mark(talk.slot), twin, strict=True))
        backend.held[talk.slot] = backend.held[talk.slot][: before[1]]  # the fake's own record
    backend.fail_at = None
    later = talk.generate(PROMPT, PICTURES, max_new_tokens=5)
    with session(chunk=None).conversation() as whole:
        whole.generate("a<image>", [2.0], max_new_tokens=3, ignore_eos=True)
        assert whole.generate(PROMPT, PICTURES, max_new_tokens=5).token_ids == later.token_ids


def test_states_that_hold_a_history_take_prompts_whole() -> None:
    """Half a prompt could not be taken back from them; a first prompt can."""
    loaded = session(base=linear())
    calls = backend_of(loaded).calls
    with loaded.conversation() as talk:
        talk.generate(PROMPT, PICTURES, max_new_tokens=2, ignore_eos=True)
        assert sum(call.input_ids.shape[1] > 1 for call in calls) == 7
        calls.clear()
        talk.generate(PROMPT, PICTURES, max_new_tokens=2, ignore_eos=True)
        assert sum(call.input_ids.shape[1] > 1 for call in calls) == 1


def test_an_engine_takes_longer_prompts_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeBackend, "limits", Limits(2, 2, 140, 4096, 1024, 1))
    whole = session(2, chunk=None)
    with pytest.raises(CapacityError, match=r"--max-input-len 5\d\d`, feed it in pieces by .*--prefill-chunk\) 140"):
        whole.generate(PROMPT, PICTURES, max_new_tokens=2)
    loaded = session(2)
    assert loaded.generate(PROMPT, PICTURES, max_new_tokens=2).token_ids
    assert max(call.input_ids.shape[1] for call in backend_of(loaded).calls) <= 140
    monkeypatch.setattr(FakeBackend, "limits", Limits(2, 2, 120, 4096, 1024, 1))
    with pytest.raises(CapacityError, match="a piece of the prompt has 128 tokens"):
        loaded.generate(PROMPT, PICTURES)
    with pytest.raises(CapacityError) as caught:
        whole.generate(PROMPT, PICTURES)
    assert "--prefill-chunk" not in str(caught.value)  # a group would not fit


@pytest.mark.parametrize(
    ("facts", "limit", "words"),
    [
        (manifest(), 0, r"prefill_chunk \(--prefill-chunk\) must be at least 1, got 0"),
        (manifest(), GROUP - 1, "at least 128, the group size of the bundle, got 127"),
        (masked("prefix"), 4096, "see themselves both ways; leave it out"),
        (masked("run"), PICTURE_TOKENS - 1, "at least 160, the tokens of a picture, .* got 159"),
        (masked("run", 16), PICTURE_TOKENS - 1, "at least 160"),
    ],
)
def test_limits_that_do_not_suit(facts: Manifest, limit: int, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        check_prefill_chunk(facts, limit)


def test_limits_that_suit() -> None:
    for facts, limit in ((manifest(), GROUP), (manifest(16), 1), (masked("run"), PICTURE_TOKENS), (linear(), GROUP)):
        check_prefill_chunk(facts, limit)
    check_prefill_chunk(masked("prefix"), None)
