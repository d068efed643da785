"""The choice of the next token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vkvx.errors import OptionError, VkvxError
from vkvx.runtime.sessions.sampling import GenerationOptions, Sampler

LOGITS = np.array([0.0, 3.0, 1.0, 2.0, -1.0], np.float32)


def draws(count: int = 4000, logits: np.ndarray = LOGITS, **options: float) -> np.ndarray:
    sampler = Sampler(GenerationOptions(**{"temperature": 1.0, **options}), len(logits))  # type: ignore[arg-type]
    return np.bincount([sampler.sample(logits).token for _ in range(count)], minlength=len(logits)) / count


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def test_greedy_takes_the_likeliest_and_leaves_the_logits_alone() -> None:
    logits = LOGITS.copy()
    assert Sampler(GenerationOptions(), 5, excluded=[0]).sample(logits).token == 1
    np.testing.assert_array_equal(logits, LOGITS)


def test_excluded_tokens_are_never_chosen() -> None:
    assert Sampler(GenerationOptions(), 5, excluded=[1, 99]).sample(LOGITS).token == 3
    sampler = Sampler(GenerationOptions(temperature=5.0), 5, excluded=[1])
    assert 1 not in {sampler.sample(LOGITS).token for _ in range(300)}


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
        assert sampler.sample(logits).token == np.searchsorted(shares, philox(seed, step + 1) / 2**64, side="right")


def test_log_probabilities_are_those_of_the_model() -> None:
    options = GenerationOptions(temperature=0.5, top_k=2, repetition_penalty=1.5, logprobs=True)
    sampler = Sampler(options, 5)
    for _ in range(5):
        token, found = sampler.sample(LOGITS)
        assert found == pytest.approx(np.log(softmax(LOGITS)[token]), rel=1e-5)
    assert Sampler(GenerationOptions(), 5).sample(LOGITS).log_probability is None


def test_repetition_penalty_weakens_what_was_seen() -> None:
    sampler = Sampler(GenerationOptions(repetition_penalty=2.0), 5)
    assert [sampler.sample(LOGITS).token for _ in range(2)] == [1, 3]  # 3 / 2 < 2, then 2 / 2 < 3 / 2
    assert sampler.sample(LOGITS).token == 1
    sampler = Sampler(GenerationOptions(repetition_penalty=2.0), 3)
    sampler.observe(np.array([0, 700, -4]))
    assert sampler.sample(np.array([-1.0, -1.5, -9.0], np.float32)).token == 1  # -1 became -2


@given(st.integers(0, 2**32), st.floats(0.1, 4), st.integers(0, 6), st.floats(0.05, 1), st.floats(0.5, 2))
def test_a_seed_repeats_itself(seed: int, temperature: float, top_k: int, top_p: float, penalty: float) -> None:
    options = GenerationOptions(
        temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty, seed=seed
    )
    runs = []
    for _ in range(2):
        sampler = Sampler(options, 5)
        runs.append([sampler.sample(LOGITS).token for _ in range(10)])
    assert runs[0] == runs[1]


def test_seeds_differ() -> None:
    results = set()
    for seed in range(5):
        sampler = Sampler(GenerationOptions(temperature=3.0, seed=seed), 5)
        results.add(tuple(sampler.sample(LOGITS).token for _ in range(20)))
    assert len(results) == 5


def test_logits_may_be_extreme_but_must_be_numbers() -> None:
    extreme = np.array([1e30, -1e30, -np.inf, 3e38], np.float32)
    assert Sampler(GenerationOptions(temperature=0.01), 4).sample(extreme).token == 3
    for bad in (np.nan, np.inf):
        for temperature in (0.0, 1.0):
            with pytest.raises(VkvxError, match="among the logits"):
                Sampler(GenerationOptions(temperature=temperature), 2).sample(np.array([0.0, bad], np.float32))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 2**64),
        ("stop", ("",)),
    ],
)
def test_refuses_senseless_options(name: str, value: object) -> None:
    with pytest.raises(OptionError, match=f"--{name.replace('_', '-')}"):
        GenerationOptions(**{name: value})  # type: ignore[arg-type]


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
