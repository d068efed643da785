"""Batches, waves, failures and stops, over a backend that checks what it is fed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_sessions import backend_of, scripted, session, tokens
from fakes import EOS, IMAGE, PICTURE_TOKENS, FakeBackend, FakeProcessor, manifest

from vkvx.errors import BatchError, CapacityError, InputError, OptionError, VkvxError
from vkvx.manifest import LayerInfo, LinearInfo, Manifest
from vkvx.runtime.sessions import scheduler as scheduling
from vkvx.runtime.sessions.generation import Chunk, Request
from vkvx.runtime.sessions.sampling import GenerationOptions
from vkvx.runtime.sessions.scheduler import Scheduler
from vkvx.runtime.sessions.session import Session


@pytest.fixture(autouse=True, params=[False, True], ids=["host", "ahead"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the backend chooses tokens, so that a call is under way while those of the one before are read."""
    monkeypatch.setattr(FakeBackend, "samples", request.param)
    return bool(request.param)


PROMPTS = ["no picture", "<image>one", "a<image>b<image> two", "three <image><image> <image>"]
PICTURES: list[Any] = [None, [1.0], [2.0, 3.0], [1.0, 4.0, 2.0]]


@pytest.mark.parametrize("bits", [1, 16])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 40, "seed": 5, "repetition_penalty": 1.2}])
def test_a_row_gets_in_a_batch_what_it_gets_alone(bits: int, options: dict[str, Any]) -> None:
    alone = [
        session(1, bits).generate(prompt, pictures, max_new_tokens=40, **options)
        for prompt, pictures in zip(PROMPTS, PICTURES, strict=True)
    ]
    assert len({generation.token_ids for generation in alone}) == 4
    for slots in (1, 2, 3, 4, 7):
        loaded = session(slots, bits)
        together = loaded.generate(PROMPTS, PICTURES, max_new_tokens=40, **options)
        assert [tokens(one) for one in together] == [tokens(one) for one in alone]
        assert loaded.backend.cache.free_slots == tuple(range(slots))


RULES: list[dict[str, Any]] = [
    {"min_new_tokens": 9},
    {"min_new_tokens": 30, "temperature": 1.2, "top_p": 0.8, "seed": 3, "logprobs": True},
    {"suppress_tokens": tuple(range(100, 256)), "begin_suppress_tokens": tuple(range(50, 100))},
    {"no_repeat_ngram_size": 1, "repetition_penalty": 1.4},
    {"bad_words_ids": ((5,), (6, 7)), "temperature": 3.0, "top_k": 9, "logprobs": True},
    {"temperature": 2.0, "top_k": 2**40},
]


def test_a_backend_chooses_by_the_same_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rule alone, and all in one batch, where those that look back make the host choose for all."""
    found = []
    for samples in (False, True):
        monkeypatch.setattr(FakeBackend, "samples", samples)
        given = [GenerationOptions(max_new_tokens=30, **rules) for rules in RULES]
        alone = [session().generate("<image>one", [1.0], options=options) for options in given]
        together = session(3).generate(["<image>one"] * len(RULES), [[1.0]] * len(RULES), options=given)
        assert [tokens(one) for one in alone] == [tokens(one) for one in together]
        found.append([(one.token_ids, one.logprobs) for one in together])
    assert found[0] == found[1]
    assert len({ids for ids, _ in found[0]}) == len(RULES)
    assert len(found[0][0][0]) >= 9
    assert [logprobs and len(logprobs) for _, logprobs in found[0]] == [None, 30, None, None, len(found[0][4][0]), None]


def linear() -> Manifest:
    """With a layer of linear attention, whose states cannot be taken back."""
    base = manifest()
    layers = (base.model.layers[0], LayerInfo(0, 0, 0.0, linear=LinearInfo(*[2] * 5)))
    one = {name: value[:1] for name, value in vars(base.quantization).items() if isinstance(value, tuple)}
    return replace(base, model=replace(base.model, layers=layers), quantization=replace(base.quantization, **one))


def test_where_states_cannot_be_taken_back_a_conversation_waits_for_each_token(ahead: bool) -> None:
    backend = FakeBackend(linear(), 1)
    loaded = Session(backend.manifest, backend, FakeProcessor())  # type: ignore[arg-type]
    expected = loaded.generate("[a]", max_new_tokens=20)
    assert bool(backend.sequences) == ahead
    backend.sequences.clear()
    with loaded.conversation() as talk:
        assert talk.generate("[a]", max_new_tokens=20).token_ids == expected.token_ids
        assert backend.cache.length(talk.slot) == len(talk.token_ids) - 1
    assert not backend.sequences


class Clock:
    """In place of a module's ``time``: seconds pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_time_between_steps_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a consumer takes is no time of an answer, and what passes after a cancelled prompt is no debt."""
    clock = Clock()
    monkeypatch.setattr(scheduling, "time", clock)
    for chunk in session().stream("x", max_new_tokens=6, ignore_eos=True):
        clock.now += 1.0
        last = chunk.generation
    assert last is not None
    assert (last.prefill_seconds, last.decode_seconds) == (0, 0)
    loaded = session(2)
    scheduler, processor = Scheduler(loaded.backend), FakeProcessor()

    def submit(row: int) -> Request:
        options = GenerationOptions(max_new_tokens=200, ignore_eos=True)
        request = Request(row, processor.prepare("x"), options, processor, loaded.backend)  # type: ignore[arg-type]
        scheduler.submit(request)
        return request

    requests = [submit(0)]
    scheduler.step()
    requests.append(submit(1))
    scheduler.step()
    for request in requests:
        scheduler.cancel(request)
    clock.now += 1000.0
    for row in (2, 3):
        submit(row)
        scheduler.step()
    assert scheduler.waiting == 0


def test_no_token_that_is_left(ahead: bool) -> None:
    with pytest.raises(OptionError, match="no token is left"):
        session().generate("x", suppress_tokens=tuple(range(256)))


def test_finished_rows_leave_and_waiting_ones_take_their_slots() -> None:
    loaded = session(2)
    lengths = [3, 9, 4, 2]
    options = [GenerationOptions(max_new_tokens=length, ignore_eos=True) for length in lengths]
    results = loaded.generate(PROMPTS, PICTURES, options=options)
    assert [len(one.token_ids) for one in results] == lengths
    calls = backend_of(loaded).calls
    shapes = [call.input_ids.shape for call in calls]
    assert shapes[0][0] == 2  # two prompts start together
    starts = [shape for shape in shapes if shape[1] > 1]
    assert [shape[0] for shape in starts] == [2, 1, 1]  # the others one by one, between decode steps
    assert max(len(set(call.slot.tolist())) for call in calls) == 2
    assert sum(shape[0] for shape in shapes) == sum(lengths)  # every row of a call gives a token


def test_long_prompts_do_not_start_together() -> None:
    loaded = session(4, text_tokens=3000)
    loaded.generate(["x" * 1500] * 4, max_new_tokens=1)
    assert [call.input_ids.shape[0] for call in backend_of(loaded).calls] == [2, 2]


def test_an_image_token_is_never_chosen() -> None:
    loaded = session()
    backend_of(loaded).script = [IMAGE]
    assert IMAGE not in loaded.generate("[q]", max_new_tokens=1).token_ids


def test_ends_at_eos_unless_told_otherwise() -> None:
    loaded = scripted(b"ab\x02cd\x02")
    generation = loaded.generate("[q]", max_new_tokens=5)
    assert (generation.text, generation.finish_reason) == ("ab", "eos")
    assert generation.token_ids == (97, 98, EOS)
    assert (generation.prompt_tokens, generation.visual_tokens) == (4, 0)
    generation = loaded.generate("[q]", max_new_tokens=5, ignore_eos=True)
    assert (generation.text, generation.finish_reason) == ("abcd", "length")


def test_counts_and_times() -> None:
    generation = session().generate("<image>one", [1.0], max_new_tokens=6, ignore_eos=True)
    assert (generation.prompt_tokens, generation.visual_tokens) == (PICTURE_TOKENS + 4, PICTURE_TOKENS)
    assert generation.prefill_seconds > 0
    assert generation.tokens_per_second == 5 / generation.decode_seconds
    assert session().generate("a", max_new_tokens=1).tokens_per_second == 0


@pytest.mark.parametrize(
    ("answer", "stop", "text", "reason"),
    [
        ("one two###three", ("###",), "one two", "stop"),
        ("one ##two", ("###",), "one ##two", "length"),
        ("naïve ☃ stop", ("☃",), "naïve ", "stop"),
        ("ends with ##", ("###",), "ends with ##", "length"),
        ("ends here###", ("###",), "ends here", "stop"),
        ("ab", ("b", "ab"), "", "stop"),
    ],
)
def test_stop_strings_never_show(answer: str, stop: tuple[str, ...], text: str, reason: str) -> None:
    options: dict[str, Any] = {"stop": stop, "max_new_tokens": len(answer.encode()), "ignore_eos": True}
    seen = ""
    last: Chunk | None = None
    for chunk in scripted(answer).stream("[q]", **options):
        seen += chunk.text
        assert text.startswith(seen)
        last = chunk
    assert last is not None
    assert last.generation is not None
    assert (seen, last.finish_reason) == (text, reason)
    assert last.generation.text == text
    assert scripted(answer).generate("[q]", **options).text == text


def test_answers_begin_with_their_first_word() -> None:
    """Whatever white space models put before it; streams, whole answers and conversations have the same text."""
    answer = "\n a \n b"
    options: dict[str, Any] = {"max_new_tokens": len(answer), "ignore_eos": True}
    chunks = list(scripted(answer).stream("[q]", **options))
    assert [chunk.text for chunk in chunks] == ["", "", "a", " ", "\n", " ", "b"]
    assert chunks[-1].generation is not None
    assert chunks[-1].generation.text == "a \n b"
    assert bytes(chunks[-1].generation.token_ids) == answer.encode()
    talk = scripted(answer).conversation()
    assert "".join(talk.ask("q", **options)) == "a \n b"
    assert talk.messages[1]["content"] == "a \n b"
    assert scripted("  ").generate("[q]", max_new_tokens=2).text == ""


def test_an_incomplete_character_at_the_end_is_shown_as_such() -> None:
    generation = scripted("a€").generate("[q]", max_new_tokens=3)
    assert generation.text == "a\ufffd"


def test_stream_equals_generate() -> None:
    loaded = session(2)
    expected = loaded.generate(PROMPTS, PICTURES, max_new_tokens=20)
    texts, ids, ends = [""] * 4, [[] for _ in PROMPTS], {}  # type: ignore[var-annotated]
    for chunk in session(2).stream(PROMPTS, PICTURES, max_new_tokens=20):
        texts[chunk.row] += chunk.text
        ids[chunk.row] += chunk.token_ids
        assert (chunk.finish_reason is None) == (chunk.generation is None)
        if chunk.generation:
            ends[chunk.row] = chunk.generation
    for row, one in enumerate(expected):
        assert (texts[row], tuple(ids[row])) == (one.text, one.token_ids)
        assert tokens(ends[row]) == tokens(one)


def test_an_abandoned_stream_frees_its_slots() -> None:
    loaded = session(2)
    stream = loaded.stream(PROMPTS, PICTURES)
    next(stream)
    assert loaded.backend.cache.free_slots == ()
    stream.close()
    assert loaded.backend.cache.free_slots == (0, 1)


def test_streams_of_one_session_do_not_disturb_each_other() -> None:
    expected = [tokens(session().generate(prompt, max_new_tokens=12)) for prompt in ("first", "second")]
    loaded = session(2)
    streams = [loaded.stream(prompt, max_new_tokens=12) for prompt in ("first", "second")]
    results: list[Any] = [None, None]
    while any(result is None for result in results):
        for number, stream in enumerate(streams):
            chunk = next(stream, None)
            if chunk is not None and chunk.generation is not None:
                results[number] = tokens(chunk.generation)
    assert results == expected


def test_seeds_may_differ_by_row() -> None:
    options = [GenerationOptions(temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    first, second, third = session(3).generate(["x"] * 3, options=options, max_new_tokens=12)
    assert first.token_ids == second.token_ids != third.token_ids


# Failures of single rows


def test_a_row_that_fails_leaves_the_others_alone() -> None:
    prompts = ["[one]", "[bad]", "<image>no such picture", "<image>[two]", "[three]"]
    pictures: list[Any] = [None, None, [-1.0], [2.0], None]
    alone = [session().generate(prompts[i], pictures[i], max_new_tokens=12) for i in (0, 3, 4)]
    for slots in (1, 2, 5):
        loaded = session(slots)
        backend_of(loaded).nan_after = "[bad]"
        with pytest.raises(
            BatchError, match=r"2 of 5 prompts failed, first prompts\[1\]: .*nan among the logits"
        ) as caught:
            loaded.generate(prompts, pictures, max_new_tokens=12)
        first, bad, refused, *others = caught.value.generations
        assert bad is refused is None
        assert [tokens(one) for one in (first, *others) if one] == [tokens(one) for one in alone]
        assert isinstance(caught.value.errors[1], VkvxError)
        assert caught.value.__cause__ is caught.value.errors[1]
        assert str(caught.value.errors[2]) == "no such picture"
        assert loaded.backend.cache.free_slots == tuple(range(slots))


def test_a_stream_goes_on_past_a_row_that_fails() -> None:
    loaded = scripted("yes", slots=2)
    backend_of(loaded).nan_after = "[bad]ye"
    texts = {0: "", 1: ""}

    def read() -> None:
        for chunk in loaded.stream(["[bad]", "[good]"], max_new_tokens=3):
            texts[chunk.row] += chunk.text

    with pytest.raises(BatchError, match="1 of 2"):
        read()
    assert texts == {0: "ye", 1: "yes"}
    assert loaded.backend.cache.free_slots == (0, 1)


def test_a_prompt_that_is_alone_fails_with_its_own_error() -> None:
    loaded = session()
    backend_of(loaded).nan_after = "[bad]"
    for prompt in ("[bad]", ["[bad]"]):
        with pytest.raises(VkvxError, match="among the logits") as caught:
            loaded.generate(prompt)
        assert not isinstance(caught.value, BatchError)
    with pytest.raises(RuntimeError, match="no such picture"):
        loaded.generate("<image>", [-1.0])
    assert loaded.generate("[good]", max_new_tokens=2).token_ids


def test_a_conversation_keeps_what_was_fed_before_a_failure() -> None:
    loaded = scripted(b"yes\x02")
    talk = loaded.conversation()
    backend_of(loaded).nan_after = "[a]ye"
    with pytest.raises(VkvxError, match="among the logits"):
        list(talk.ask("a"))
    assert bytes(talk.token_ids) == b"\x01[a]ye"
    assert talk.messages[1]["content"] == "ye"
    before = talk.token_ids
    with pytest.raises(RuntimeError, match="no such picture"):
        list(talk.ask("b", [-1.0]))
    assert talk.token_ids == before
    assert "".join(talk.ask("b")) == "yes"


# Refusals


def test_what_does_not_fit_is_refused_before_anything_runs() -> None:
    loaded = session(2, visual_tokens=256, text_tokens=20)
    with pytest.raises(CapacityError, match="--max-visual-tokens"):
        loaded.generate(["fits", "<image><image>"], [None, [1.0, 2.0]], max_new_tokens=4)
    with pytest.raises(CapacityError, match=r"21 text tokens.*--max-text-tokens.*--max-new-tokens"):
        loaded.generate("abc", max_new_tokens=18)
    assert backend_of(loaded).calls == []
    generation = loaded.generate("abc", max_new_tokens=17, ignore_eos=True)  # the last token is never fed
    assert len(generation.token_ids) == 17


def test_a_refused_turn_changes_nothing() -> None:
    loaded = session(1, visual_tokens=256, text_tokens=40)
    talk = loaded.conversation()
    list(talk.ask("a", [1.0], max_new_tokens=4))
    before = (talk.token_ids, talk.messages, loaded.backend.cache.length(talk.slot))
    with pytest.raises(CapacityError, match="0 of 2 free"):
        talk.ask("b", [2.0])
    with pytest.raises(CapacityError, match="--max-text-tokens"):
        talk.ask("c", max_new_tokens=40)
    with pytest.raises(OptionError):
        talk.ask("d", temperature=-1)
    assert (talk.token_ids, talk.messages, loaded.backend.cache.length(talk.slot)) == before
    list(talk.ask("e", max_new_tokens=4))


def test_the_last_row_of_a_cache_can_be_used() -> None:
    loaded = session(1, text_tokens=30)
    talk = loaded.conversation()
    talk.generate("x" * 9, max_new_tokens=10, ignore_eos=True)  # 10 + 9 rows, one token waits
    talk.generate("y" * 5, max_new_tokens=6, ignore_eos=True)  # 6 + 5 rows
    assert loaded.backend.cache.text_tokens(talk.slot) == 30
    with pytest.raises(CapacityError):
        talk.generate("z", max_new_tokens=1)


def test_the_positions_of_the_model_are_a_limit() -> None:
    loaded = session(1, max_positions=200)
    with pytest.raises(CapacityError, match=r"position 201.*200"):
        loaded.generate("<image>" + "x" * 29, [1.0], max_new_tokens=12)
    loaded.generate("<image>" + "x" * 29, [1.0], max_new_tokens=11, ignore_eos=True)


@pytest.mark.parametrize(
    ("prompts", "images", "options", "error"),
    [
        (["a", "b"], [None], {}, InputError),
        (["a", "b"], 1.0, {}, InputError),
        (["a", "b"], None, {"options": [GenerationOptions()]}, OptionError),
        ("a", None, {"max_tokens": 3}, OptionError),
        ("a", None, {"top_p": 2}, OptionError),
    ],
)
def test_refuses_what_does_not_match(prompts: Any, images: Any, options: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        session().stream(prompts, images, **options)


def test_random_schedules_feed_every_row_rightly() -> None:
    random = np.random.default_rng(3)
    for _ in range(6):
        count = int(random.integers(1, 9))
        chosen = random.integers(0, 4, count).tolist()
        prompts = [PROMPTS[i] + "x" * int(random.integers(0, 5)) for i in chosen]
        pictures = [PICTURES[i] for i in chosen]
        options = [GenerationOptions(max_new_tokens=int(random.integers(1, 15))) for _ in chosen]
        together = session(int(random.integers(1, 5))).generate(prompts, pictures, options=options)
        for prompt, picture, option, one in zip(prompts, pictures, options, together, strict=True):
            assert tokens(session().generate(prompt, picture, options=option)) == tokens(one)
