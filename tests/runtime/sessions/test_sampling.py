"""The choice of the next token."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeBackend, FakeProcessor, manifest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, GenerationMixin

from vkvx.errors import OptionError, VkvxError
from vkvx.runtime.sessions.sampling import Choice, GenerationOptions, Sampler, default_options
from vkvx.runtime.sessions.session import Session
from vkvx.sampling import GenerationInfo

LOGITS = np.array([0.0, 3.0, 1.0, 2.0, -1.0], np.float32)


def sampled(sampler: Sampler, logits: np.ndarray) -> Choice:
    choice = sampler.choose(logits)
    sampler.note(choice.token)
    return choice


def draws(count: int = 4000, logits: np.ndarray = LOGITS, **options: float) -> np.ndarray:
    sampler = Sampler(GenerationOptions(**{"temperature": 1.0, **options}), len(logits))  # type: ignore[arg-type]
    return np.bincount([sampled(sampler, logits).token for _ in range(count)], minlength=len(logits)) / count


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def test_greedy_takes_the_likeliest_and_leaves_the_logits_alone() -> None:
    logits = LOGITS.copy()
    assert sampled(Sampler(GenerationOptions(), 5, excluded=[0]), logits).token == 1
    np.testing.assert_array_equal(logits, LOGITS)


def test_excluded_tokens_are_never_chosen() -> None:
    assert sampled(Sampler(GenerationOptions(), 5, excluded=[1, 99]), LOGITS).token == 3
    sampler = Sampler(GenerationOptions(temperature=5.0), 5, excluded=[1])
    assert 1 not in {sampled(sampler, LOGITS).token for _ in range(300)}


def test_frequencies_follow_the_softmax() -> None:
    np.testing.assert_allclose(draws(), softmax(LOGITS), atol=0.03)
    np.testing.assert_allclose(draws(temperature=2.5), softmax(LOGITS / 2.5), atol=0.03)


def test_top_k_keeps_the_k_likeliest() -> None:
    expected = softmax(np.where(LOGITS >= 2, LOGITS, -np.inf))
    np.testing.assert_allclose(draws(top_k=2), expected, atol=0.03)
    assert draws(top_k=1)[1] == 1
    np.testing.assert_allclose(draws(top_k=50), softmax(LOGITS), atol=0.03)


def test_top_p_keeps_up_to_the_token_that_reaches_it() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.3, 0.09], np.float32))
    np.testing.assert_allclose(draws(logits=logits, top_p=0.7), [0, 0.625, 0.375, 0], atol=0.03)
    assert draws(logits=logits, top_p=0.4)[1] == 1
    assert draws(logits=logits, top_p=1e-9)[1] == 1
    # After top_k the shares are 5/9, 3/9, 1/9: two of them reach 0.85, 0.9 takes the third.
    np.testing.assert_allclose(draws(logits=logits, top_p=0.85, top_k=3), [0, 0.625, 0.375, 0], atol=0.03)
    np.testing.assert_allclose(draws(logits=logits, top_p=0.9, top_k=3), [0.111, 0.556, 0.333, 0], atol=0.03)


def test_tokens_as_likely_as_the_last_one_are_kept() -> None:
    logits = np.array([2.0, 5.0, 2.0, 1.0, 2.0], np.float32)
    expected = softmax(np.where(logits >= 2, logits, -np.inf))
    np.testing.assert_allclose(draws(logits=logits, top_k=2), expected, atol=0.03)
    np.testing.assert_allclose(draws(logits=logits, top_p=0.88), expected, atol=0.03)


def philox(seed: int, counter: int) -> int:
    """First number of Philox4x64-10, from its authors' paper (Salmon et al., SC11)."""
    a, b, c, d = counter, 0, 0, 0
    low, high = seed, 0
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (second >> 64) ^ b ^ low, second % 2**64, (first >> 64) ^ d ^ high, first % 2**64
        low, high = (low + 0x9E3779B97F4A7C15) % 2**64, (high + 0xBB67AE8584CAA73B) % 2**64
    return a


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_draws_are_those_of_the_documented_generator(seed: int) -> None:
    """A kernel computes the same: the token of a draw follows from seed, number of the draw and weights."""
    logits = np.random.default_rng(1).normal(0, 3, 1000).astype(np.float32)
    sampler = Sampler(GenerationOptions(temperature=0.7, seed=seed), len(logits))
    shares = np.cumsum(softmax(logits.astype(np.float64) / np.float32(0.7)))
    for step in range(20):
        assert sampled(sampler, logits).token == np.searchsorted(shares, philox(seed, step + 1) / 2**64, side="right")


def test_log_probabilities_are_those_of_the_model() -> None:
    options = GenerationOptions(temperature=0.5, top_k=2, repetition_penalty=1.5, logprobs=True)
    sampler = Sampler(options, 5)
    for _ in range(5):
        token, found = sampled(sampler, LOGITS)
        assert found == pytest.approx(np.log(softmax(LOGITS)[token]), rel=1e-5)
    assert sampled(Sampler(GenerationOptions(), 5), LOGITS).log_probability is None


def test_repetition_penalty_weakens_what_was_seen() -> None:
    sampler = Sampler(GenerationOptions(repetition_penalty=2.0), 5)
    assert [sampled(sampler, LOGITS).token for _ in range(2)] == [1, 3]  # 3 / 2 < 2, then 2 / 2 < 3 / 2
    assert sampled(sampler, LOGITS).token == 1
    sampler = Sampler(GenerationOptions(repetition_penalty=2.0), 3)
    sampler.observe(np.array([0, 700, -4]))
    assert sampled(sampler, np.array([-1.0, -1.5, -9.0], np.float32)).token == 1  # -1 became -2


@given(st.integers(0, 2**32), st.floats(0.1, 4), st.integers(0, 6), st.floats(0.05, 1), st.floats(0.5, 2))
def test_a_seed_repeats_itself(seed: int, temperature: float, top_k: int, top_p: float, penalty: float) -> None:
    options = GenerationOptions(
        temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty, seed=seed
    )
    runs = []
    for _ in range(2):
        sampler = Sampler(options, 5)
        runs.append([sampled(sampler, LOGITS).token for _ in range(10)])
    assert runs[0] == runs[1]


def test_seeds_differ() -> None:
    results = set()
    for seed in range(5):
        sampler = Sampler(GenerationOptions(temperature=3.0, seed=seed), 5)
        results.add(tuple(sampled(sampler, LOGITS).token for _ in range(20)))
    assert len(results) == 5


def test_logits_may_be_extreme_but_must_be_numbers() -> None:
    extreme = np.array([1e30, -1e30, -np.inf, 3e38], np.float32)
    assert sampled(Sampler(GenerationOptions(temperature=0.01), 4), extreme).token == 3
    for bad in (np.nan, np.inf):
        for temperature in (0.0, 1.0):
            with pytest.raises(VkvxError, match="among the logits"):
                sampled(Sampler(GenerationOptions(temperature=temperature), 2), np.array([0.0, bad], np.float32))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 1e31),
        ("repetition_penalty", 1e31),
        ("repetition_penalty", 1e-320),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
        ("no_repeat_ngram_size", -1),
        ("min_new_tokens", -1),
        ("suppress_tokens", [3, -1]),
        ("begin_suppress_tokens", [-1]),
        ("bad_words_ids", [[3], []]),
        ("bad_words_ids", [[3, -1]]),
        ("seed", -1),
        ("seed", 2**64),
        ("stop", ("",)),
    ],
)
def test_refuses_senseless_options(name: str, value: object) -> None:
    with pytest.raises(OptionError, match=f"--{name.replace('_', '-')}"):
        GenerationOptions(**{name: value})  # type: ignore[arg-type]


def test_a_least_length_above_the_greatest() -> None:
    """It is refused where a caller asks for it; a checkpoint's own gives way to what a caller asks for."""
    with pytest.raises(OptionError, match=r"\(--min-new-tokens\) 6 is more than max_new_tokens \(--max-new-tokens\) 5"):
        GenerationOptions(max_new_tokens=5, min_new_tokens=6)
    assert GenerationOptions(max_new_tokens=5, min_new_tokens=5).min_new_tokens == 5
    checkpoint = replace(manifest(), generation=GenerationInfo(min_new_tokens=300))
    assert default_options(checkpoint).min_new_tokens == 256
    assert default_options(checkpoint, 5).min_new_tokens == 5
    assert default_options(checkpoint, 400).min_new_tokens == 300
    with Session(checkpoint, FakeBackend(checkpoint, 1), FakeProcessor()) as session:  # type: ignore[arg-type]
        assert len(session.generate("[x]", max_new_tokens=4, ignore_eos=True).token_ids) == 4
        with pytest.raises(OptionError, match="300 is more than"):
            session.generate("[x]", min_new_tokens=300)
        with pytest.raises(OptionError, match="must be at least 1, got -3"):
            session.generate("[x]", max_new_tokens=-3)


def test_a_stop_string_may_come_alone() -> None:
    assert GenerationOptions(stop="###").stop == ("###",)  # type: ignore[arg-type]
    assert GenerationOptions(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_new_tokens", 2.5, "a whole number"),
        ("max_new_tokens", True, "a whole number"),
        ("top_k", 2.0, "a whole number"),
        ("seed", "7", "a whole number"),
        ("temperature", "hot", "a number"),
        ("temperature", None, "a number"),
        ("top_p", float("nan"), "above 0"),
        ("repetition_penalty", False, "a number"),
        ("ignore_eos", 1, "True or False"),
        ("no_repeat_ngram_size", 2.0, "a whole number"),
        ("suppress_tokens", 5, "a list of token ids"),
        ("begin_suppress_tokens", ["5"], "a list of token ids"),
        ("bad_words_ids", [5], "lists of token ids"),
        ("bad_words_ids", [[True]], "lists of token ids"),
        ("stop", 5, "strings"),
        ("stop", [5], "strings"),
    ],
)
def test_options_of_other_types_are_refused(name: str, value: object, words: str) -> None:
    with pytest.raises(OptionError, match=rf"^{name} \(--{name.replace('_', '-')}\) must be {words}"):
        GenerationOptions(**{name: value})  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers() -> None:
    options = GenerationOptions(
        max_new_tokens=np.int64(3), top_p=np.float32(0.5), temperature=1, ignore_eos=np.bool_(True)
    )
    assert options == GenerationOptions(max_new_tokens=3, top_p=0.5, temperature=1.0, ignore_eos=True)
    assert [type(x) for x in (options.max_new_tokens, options.temperature, options.ignore_eos)] == [int, float, bool]


VOCABULARY = 24
ENDS = (2, 5)
RULES: list[dict[str, Any]] = [
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3, "repetition_penalty": 1.3},
    {"suppress_tokens": [0, 3, 9]},
    {"begin_suppress_tokens": list(range(22))},
    {"bad_words_ids": [[4], [6, 7], [8, 9, 10], [2], [5, 5]]},
    {"min_new_tokens": 3},
    {"repetition_penalty": 0.7, "bad_words_ids": [[1, 2]], "suppress_tokens": [2], "min_new_tokens": 30},
    {
        "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 2,
        "begin_suppress_tokens": [1],
        "suppress_tokens": [3],
        "bad_words_ids": [[4, 4], [11]],
        "min_new_tokens": 5,
    },
]


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: "-".join(rules))
def test_rules_are_those_of_transformers(rules: dict[str, Any]) -> None:
    """Token for token, with few tokens, so that every rule is met: each step is compared on the same history."""
    changed = 0
    for seed, prompt in enumerate([[20], [4, 4], [4, 6, 4, 6, 8, 9, 2, 4, 6, 1, 1]] * 5):
        config = GenerationConfig(**rules, eos_token_id=list(ENDS))
        config._eos_token_tensor = torch.tensor(ENDS)
        mixin = type("Model", (GenerationMixin,), {"config": SimpleNamespace(is_encoder_decoder=False)})()
        processors = mixin._get_logits_processor(config, input_ids_seq_length=len(prompt))
        sampler = Sampler(GenerationOptions(**rules), VOCABULARY, ends=ENDS)
        sampler.observe(prompt)
        history, random = list(prompt), np.random.default_rng(seed)
        for _ in range(12):
            logits = random.standard_normal(VOCABULARY).astype(np.float32)
            expected = int(processors(torch.tensor([history]), torch.from_numpy(logits)[None].clone()).argmax())
            assert sampled(sampler, logits).token == expected
            changed += expected != int(logits.argmax())
            history.append(expected)
    assert changed, "no rule was met"


def test_rules_that_leave_no_token() -> None:
    sampler = Sampler(GenerationOptions(suppress_tokens=[0, 1], bad_words_ids=[[2]]), 3)
    with pytest.raises(OptionError, match=r"no token is left .* suppress_tokens=, bad_words_ids="):
        sampled(sampler, np.zeros(3, np.float32))


def test_tokens_beyond_the_vocabulary_are_never_chosen_anyway() -> None:
    options = GenerationOptions(
        suppress_tokens=[99], begin_suppress_tokens=[98], bad_words_ids=[[97], [1, 96]], no_repeat_ngram_size=2
    )
    sampler = Sampler(options, 5, ends=[95])
    sampler.observe([1, 700, 1])
    assert sampled(sampler, LOGITS).token == 1
