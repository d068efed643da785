"""The stress set at reduced size: every method is judged, the limits are within reach, and it tells methods apart."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from vkvx.errors import OptionError
from vkvx.evaluation import stress
from vkvx.evaluation.stress import REDUCED, Method, Sequences, StressOutcome, StressSetting, methods, run_stress, table
from vkvx.evaluation.stress_cases import CASES
from vkvx.format import BITS, QUANTIZERS, SCORE_CORRECTIONS

CPU = torch.device("cpu")
EVERY_METHOD = methods()
Results = dict[Method, dict[str, StressOutcome]]


@pytest.fixture(scope="module")
def results() -> Results:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return dict(run_stress(EVERY_METHOD, CASES, REDUCED))
    finally:
        torch.set_num_threads(threads)


def test_every_method_and_case(results: Results) -> None:
    assert len(results) == len(BITS) * len(QUANTIZERS) * len(SCORE_CORRECTIONS)
    for outcomes in results.values():
        assert list(outcomes) == list(CASES)
        assert all(math.isfinite(outcome.figure) for outcome in outcomes.values())


@pytest.mark.parametrize("case", ["same_picture_twice", "long_answer"])
def test_what_no_method_may_fail(results: Results, case: str) -> None:
    """These test the cache, not the codes."""
    assert [method for method, outcomes in results.items() if not outcomes[case].passed] == []


def test_extreme_values_stay_in_their_row(results: Results) -> None:
    """At most the row of the largest FP16 numbers, one of six, is not finite, and at one bit not even that."""
    for method, outcomes in results.items():
        assert outcomes["extreme_values"].figure <= 1 / 6
        assert outcomes["extreme_values"].passed or method.bits > 1


@pytest.mark.parametrize(
    "case", ["outlier_channels", "needle", "flat_attention", "tiny_variance", "long_text", "several_pictures"]
)
def test_the_set_discriminates(results: Results, case: str) -> None:
    """Each of these is passed by some methods and failed by others."""
    verdicts = {outcomes[case].passed for outcomes in results.values()}
    assert verdicts == {True, False}


def test_figures_that_the_mathematics_gives(results: Results) -> None:
    """Without differences from the mean a channel around 1,000 is lost; scores of codes that vary too little or too
    much change the weight of a picture; means of two levels at the extremes are not the mean.
    """
    one_bit = {m.quantizer: o for m, o in results.items() if m.bits == 1 and m.score_correction == "none"}
    assert one_bit["shrink"]["tiny_variance"].figure > 500
    assert one_bit["lloyd"]["tiny_variance"].figure < 4
    assert one_bit["minmax"]["long_text"].figure > 0.5
    assert one_bit["minmax"]["flat_attention"].figure > 10 * one_bit["lloyd"]["flat_attention"].figure
    plain, corrected = (
        results[Method("lloyd", correction, 1)]["long_text"].figure for correction in ("none", "expected")
    )
    assert corrected < plain / 2


@pytest.mark.parametrize("case", ["needle", "flat_attention", "long_text", "several_pictures", "outlier_channels"])
def test_eight_bits_keep_to_the_limits(results: Results, case: str) -> None:
    """A limit that 256 levels between the extremes miss would ask for what no cache can give."""
    assert results[Method("minmax", "none", 8)][case].passed


@pytest.mark.parametrize("case", ["needle", "long_text", "several_pictures", "outlier_channels"])
def test_a_cache_that_forgets_fails(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers come from the picture: with its keys lost, every case that asks for one fails."""
    ask = Sequences.ask

    def blind(self: Sequences, *arguments: Any, **more: Any) -> torch.Tensor:
        self.caches["visual_key"] = torch.zeros_like(self.caches["visual_key"])
        return ask(self, *arguments, **more)

    monkeypatch.setattr(Sequences, "ask", blind)
    assert not CASES[case](StressSetting(Method("lloyd", "none", 8), REDUCED, CPU)).passed


def test_one_output_that_is_not_finite_fails_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Sequences.ask

    def spoil(self: Sequences, *arguments: Any, **more: Any) -> torch.Tensor:
        self.finite[0] = False
        return ask(self, *arguments, **more)

    setting = StressSetting(Method("minmax", "none", 8), REDUCED, CPU)
    assert CASES["flat_attention"](setting).passed
    monkeypatch.setattr(Sequences, "ask", spoil)
    assert not CASES["flat_attention"](setting).passed


def test_the_cache_is_read_as_exact_attention_at_eight_bits() -> None:
    """The two ways to compute an answer agree where codes cost nothing: values and keys on a grid of 256 levels."""
    random = torch.Generator().manual_seed(0)
    key, value = (torch.randint(256, (2, 2, 300, 32), generator=random) / 64 - 2 for _ in range(2))
    for x in (key, value):
        x[:, :, :2] = torch.tensor([-2.0, 255 / 64 - 2])[:, None]  # extremes, so that levels are those of the grid
        x[:, :, 256:258] = x[:, :, :2]
    sequences = Sequences(StressSetting(Method("minmax", "none", 8), REDUCED, CPU), 2, 32, 300, 40, rows=2)
    sequences.picture(key, value)
    text_key, text_value = (torch.randn(2, 2, 40, 32, generator=random) for _ in range(2))
    sequences.text(text_key, text_value, tokens_a_call=16)
    query = torch.randn(2, 6, 32, generator=random)
    expected = stress.exact(query, torch.cat([key, text_key], 2), torch.cat([value, text_value], 2))
    assert (sequences.ask(query) - expected).abs().max() < 1e-5
    assert sequences.visual_count.tolist() == [[256, 44]] * 2


def test_table() -> None:
    some = {"a": StressOutcome(0.123, True), "b": StressOutcome(7.0, False)}
    rows = table(
        [(Method("lloyd", "none", 1), some), (Method("minmax", "none", 1), {**some, "b": StressOutcome(1, True)})]
    )
    assert [row["passed"] for row in rows] == ["1 of 2", "2 of 2", "3 of 4"]
    assert [row["b"] for row in rows] == ["FAIL 7", "pass 1", "1 of 2"]
    assert all(list(row) == list(rows[0]) for row in rows)


def test_bits_that_do_not_exist() -> None:
    with pytest.raises(OptionError, match="3 bits"):
        methods([3])


def test_the_page_describes_every_case() -> None:
    page = (Path(__file__).parents[2] / "docs/stress.md").read_text(encoding="utf-8")
    page = page.partition("| case |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", page, flags=re.M) == list(CASES)
