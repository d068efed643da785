"""Conversations: turns, forks, interruptions, over a backend that checks what it is fed."""

from __future__ import annotations

import pytest
from fake_sessions import backend_of, scripted, session, tokens
from fakes import EOS, IMAGE, PICTURE_TOKENS, FakeBackend

from vkvx.errors import CapacityError, InputError


@pytest.fixture(autouse=True, params=[False, True], ids=["host", "ahead"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the backend chooses tokens, so that a call is under way while those of the one before are read."""
    monkeypatch.setattr(FakeBackend, "samples", request.param)
    return bool(request.param)


@pytest.mark.parametrize("bits", [1, 16])
def test_later_turns_build_on_what_is_packed(bits: int) -> None:
    loaded = session(2, bits)
    with loaded.conversation() as talk:
        first = "".join(talk.ask("what is this", [1.0], max_new_tokens=6))
        assert talk.last is not None
        assert talk.last.text == first
        second = "".join(talk.ask("and this", [2.0, 3.0], max_new_tokens=6))
        third = talk.generate("raw", max_new_tokens=5)
        roles = [message["role"] for message in talk.messages]
        assert roles == ["user", "assistant"] * 2
        assert talk.messages[1]["content"] == first
        assert talk.messages[3]["content"] == second
        history, cache = talk.token_ids, loaded.backend.cache
        assert cache.length(talk.slot) == len(history) - 1  # the token chosen last waits for the next turn
        assert cache.visual_tokens(talk.slot) == 3 * PICTURE_TOKENS
        assert talk.bytes_used == cache.bytes_used(talk.slot)
        assert history[-5:][-len(third.token_ids) :] == third.token_ids[-5:]
    assert loaded.backend.cache.free_slots == (0, 1)
    # The turns were fed as one sequence: the same tokens in one go lead to the same answer.
    again = session(1, bits)
    prompt_length = len(history) - len(third.token_ids)
    held = backend_of(loaded).held[0][: len(history) - 1]
    assert len(held) == len(history) - 1
    assert [IMAGE if value > 255 or value != int(value) else int(value) for value in held] == list(history[:-1])
    assert again.backend._logits(held[:prompt_length]).argmax() == third.token_ids[0]  # type: ignore[attr-defined]


def test_a_template_and_the_model_may_both_end_an_answer() -> None:
    loaded = scripted(b"yes\x02")
    talk = loaded.conversation()
    assert "".join(talk.ask("a")) == "yes"
    assert talk.token_ids[-1] == EOS
    assert "".join(talk.ask("b")) == "yes"
    text = bytes(talk.token_ids)
    assert text == b"\x01[a]yes\x02[b]yes\x02"  # one end between the turns
    assert list(backend_of(loaded).held[0][: len(text) - 1]) == list(text[:-1])


def test_an_answer_cut_short_is_ended_by_the_template() -> None:
    loaded = scripted(b"yes, well\x02")
    talk = loaded.conversation()
    assert "".join(talk.ask("a", max_new_tokens=3)) == "yes"
    assert "".join(talk.ask("b", stop=", ")) == "yes"
    assert bytes(talk.token_ids) == b"\x01[a]yes\x02[b]yes, "


def test_fork_goes_its_own_way() -> None:
    loaded = session(3)
    talk = loaded.conversation()
    list(talk.ask("start", [1.0], max_new_tokens=5))
    twin = talk.fork()
    assert twin.token_ids == talk.token_ids
    assert twin.messages == talk.messages
    backend_of(loaded).held[twin.slot] = list(backend_of(loaded).held[talk.slot])  # the fake's own record
    same = ["".join(one.ask("next", max_new_tokens=6)) for one in (talk, twin)]
    assert same[0] == same[1]
    other = "".join(twin.ask("else", max_new_tokens=6))
    assert other != "".join(talk.ask("next", max_new_tokens=6))
    third = loaded.conversation()
    with pytest.raises(CapacityError, match="slots"):
        talk.fork()
    third.close()
    twin.close()
    talk.close()
    assert loaded.backend.cache.free_slots == (0, 1, 2)
    with pytest.raises(InputError, match="closed"):
        talk.ask("more")


def test_asking_again_ends_the_answer_before() -> None:
    loaded = scripted(b"abcdefgh\x02")
    talk = loaded.conversation()
    answer = talk.ask("a")
    assert next(answer) + next(answer) == "ab"
    assert "".join(talk.ask("b")) == "abcdefgh"
    assert next(answer, None) is None
    assert [message["content"] for message in talk.messages if message["role"] == "assistant"] == ["ab", "abcdefgh"]
    assert bytes(talk.token_ids) == b"\x01[a]ab\x02[b]abcdefgh\x02"


def test_an_interrupted_prefill_leaves_the_conversation_as_it_was() -> None:
    loaded = scripted(b"yes\x02")
    talk = loaded.conversation()
    list(talk.ask("a"))
    before = (talk.token_ids, talk.messages, loaded.backend.cache.length(talk.slot))
    backend_of(loaded).fail_at = len(backend_of(loaded).calls)
    with pytest.raises(KeyboardInterrupt):
        list(talk.ask("b", [5.0]))
    assert (talk.token_ids, talk.messages, loaded.backend.cache.length(talk.slot)) == before
    backend_of(loaded).fail_at = None
    assert "".join(talk.ask("b", [5.0])) == "yes"


def test_an_interrupted_answer_can_be_followed_up(ahead: bool) -> None:
    loaded = scripted(b"yes\x02")
    talk = loaded.conversation()
    backend_of(loaded).fail_at = 2
    with pytest.raises(KeyboardInterrupt):
        list(talk.ask("a"))
    said = b"\x01[a]y" if ahead else b"\x01[a]ye"  # the last token had not been read
    assert bytes(talk.token_ids) == said
    backend_of(loaded).fail_at = None
    assert "".join(talk.ask("b")) == "yes"
    assert bytes(talk.token_ids) == said + b"\x02[b]yes\x02"


def test_conversations_and_batches_share_a_session() -> None:
    loaded = session(3)
    talk = loaded.conversation()
    list(talk.ask("hold", max_new_tokens=3))
    alone = [tokens(session().generate(prompt, max_new_tokens=8)) for prompt in ("p", "q", "r")]
    assert [tokens(one) for one in loaded.generate(["p", "q", "r"], max_new_tokens=8)] == alone
    others = [loaded.conversation() for _ in range(2)]
    with pytest.raises(CapacityError, match="slots"):
        loaded.generate("p")
    with pytest.raises(CapacityError, match="slots"):
        loaded.conversation()
    others[0].close()
    assert tokens(loaded.generate("p", max_new_tokens=8)) == alone[0]
