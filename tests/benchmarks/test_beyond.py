"""What else was tried at 1 bit: the simulation against the operator and the reference, its counts, and its refusals."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks.cases import beyond
from vkvx.errors import OptionError
from vkvx.evaluation.stress import REDUCED, Method, Sequences, StressSetting
from vkvx.evaluation.stress_cases import Needles, needles
from vkvx.plugins.reference import quantization, shaping

TOKENS = 1500


@pytest.fixture(scope="module")
def drawn() -> Needles:
    return needles(torch.Generator().manual_seed(7), TOKENS)


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    beyond.add_arguments(parser)
    return parser.parse_args(["--threads", "1", *arguments])


@pytest.mark.parametrize("count", [0, 24])
def test_needles_are_those_that_the_operator_finds(drawn: Needles, count: int) -> None:
    """Exact tokens are text rows to it; some needles are found and some are not."""
    picture = beyond.needle_picture(drawn)
    stored = beyond.packed(choice=beyond.key_norm, count=count)(picture)
    assert stored.kept is not None
    kept = stored.kept[0, 0].flatten()[:TOKENS]
    sequences = Sequences(
        StressSetting(Method("shaped", "expected", 1), REDUCED, torch.device("cpu")), 1, 64, TOKENS, count
    )
    sequences.picture(drawn.key[~kept][None, None], drawn.value[~kept][None, None])
    if count:
        sequences.text(drawn.key[kept][None, None], drawn.value[kept][None, None])
    expected = drawn.found(sequences.ask(drawn.query[None])[0])
    assert int(kept.sum()) == count
    assert beyond.find(drawn, picture, stored).tolist() == expected.tolist()
    assert 0 < int(expected.sum()) < len(expected)


def test_bits(drawn: Needles) -> None:
    """By hand: 1,500 tokens of 64 channels in 6 groups of 256, with 5 numbers of FP16 a channel and group."""
    picture = beyond.needle_picture(drawn)

    def bits(method: beyond.Method) -> float:
        return beyond.bits_per_element(method(picture), picture)

    plain = (6 * 256 * 2 + 6 * 5 * 16) / (2 * TOKENS)
    assert bits(beyond.packed()) == pytest.approx(plain)
    assert bits(beyond.packed(choice=beyond.key_norm, count=24)) == pytest.approx(plain + 16 * 24 / TOKENS)
    assert bits(beyond.packed(key_scales=True)) == pytest.approx(plain + 16 / 64 / 2)
    assert bits(beyond.mixed(beyond.loudest(0.25))) == pytest.approx(plain + 0.25 / 2 * 6 * 256 / TOKENS)


@pytest.mark.parametrize("bits", [1, 2])
def test_coordinates_are_those_of_shaped(bits: int) -> None:
    """With one number of bits the codes are as good; a rounding may tip one to another that is as good."""
    random = torch.Generator().manual_seed(bits)
    x = 3 + torch.randn(2, 200, 64, generator=random) * (0.5 + torch.rand(64, generator=random))
    directions = torch.randn(64, 20, generator=random)
    metric = directions @ directions.T / 20 + 0.1 * torch.eye(64)
    mask = torch.ones(2, 200, dtype=torch.bool)
    theirs = quantization.decode(*shaping.shape(x, mask, bits, metric))
    ours = beyond.coordinates(x, mask, metric, torch.full((2, 64), bits))
    whole, again = (float((((x - left) @ metric) * (x - left)).sum()) for left in (theirs, ours))
    assert again == pytest.approx(whole, rel=0.01)


def test_rows_of_needles() -> None:
    """What is chosen by the embeddings of pages is not asked about needles."""
    (rows,) = beyond.run(
        options("--pages", "0", "--needle-seeds", "7", "--only", "default,64 exact: e,64 exact: key n")
    )
    found = {row["method"]: (row["needle bits"], row["needles found"]) for row in rows}
    assert found["64 exact: embedding norm"] == ("-", "-")
    assert found["64 exact: key norm"][1] > found["default"][1]


def test_refusals() -> None:
    with pytest.raises(OptionError, match="no method has 'nothing' in its name"):
        next(beyond.run(options("--only", "nothing")))
    with pytest.raises(OptionError, match="--pages -1 is not supported"):
        next(beyond.run(options("--pages", "-1")))
