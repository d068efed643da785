"""``vkvx_sample`` against the sampler of the CPU: the same tokens from the same seeds, and nothing else is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from vkvx.errors import OptionError
from vkvx.plugins import torch_cuda
from vkvx.plugins.library import DTYPES, SampleParams, SampleRow, token_bits
from vkvx.runtime.sessions.sampling import Choice, GenerationOptions, Sampler

pytestmark = [pytest.mark.gpu, pytest.mark.kernels]

VOCABULARIES = (1, 5, 33, 1000, 32064, 92553, 152064, 262208)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8},
    {"temperature": 1.3, "top_k": 50},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.2},
    {"temperature": 4.0, "top_p": 0.99},
    {"temperature": 1e-3, "top_p": 0.5},
    {"repetition_penalty": 1.7},
    {"temperature": 0.5, "top_k": 7000},
    {"temperature": 1.0, "top_k": 1, "top_p": 1e-6},
)


class Sampling:
    """A call for rows of some vocabulary: buffers as large as they must be, with poison around and in them."""

    def __init__(self, options: Sequence[GenerationOptions], vocab: int, *, slots: int = 0) -> None:
        rows, words = len(options), -(-vocab // 32)
        self.options, self.vocab = options, vocab
        self.slots = slots or rows + 2
        self.slot = torch.randperm(self.slots, generator=torch.Generator().manual_seed(rows))[:rows].int().cuda()
        self.rows = np.zeros(rows, np.dtype(SampleRow))
        self.seen = torch.zeros(self.slots, words, dtype=torch.int32, device="cuda")
        self.excluded = torch.zeros(self.slots, words, dtype=torch.int32, device="cuda")
        self.last = torch.full((self.slots,), -7, dtype=torch.int32, device="cuda")
        self.probability = torch.full((rows,), 3.0, device="cuda")

    def exclude(self, row: int, tokens: Sequence[int]) -> None:
        self.excluded[self.slot[row]] = torch.from_numpy(token_bits(tokens, self.vocab)).cuda()

    def see(self, row: int, tokens: Sequence[int]) -> None:
        self.seen[self.slot[row]] = torch.from_numpy(token_bits(tokens, self.vocab)).cuda()

    def run(self, logits: torch.Tensor, step: int, **changes: Any) -> list[int]:
        for row, options in enumerate(self.options):
            for name in ("temperature", "top_p", "repetition_penalty", "top_k", "seed"):
                self.rows[row][name] = getattr(options, name)
            self.rows[row]["step"], self.rows[row]["wants_log_probability"] = step, options.logprobs
        given = torch.from_numpy(self.rows.view(np.uint8)).cuda()
        token = torch.full((len(self.rows),), -9, dtype=torch.int32, device="cuda")
        values: dict[str, Any] = {
            "dtype": DTYPES[str(logits.dtype).removeprefix("torch.")],
            "rows": len(self.rows),
            "vocab": self.vocab,
            "logits_stride": logits.stride(0),
            "logits": logits.data_ptr(),
            "options": given.data_ptr(),
            "slot": self.slot.data_ptr(),
            "seen": self.seen.data_ptr(),
            "excluded": self.excluded.data_ptr(),
            "token": token.data_ptr(),
            "last_token": self.last.data_ptr(),
            "log_probability": self.probability.data_ptr(),
        }
        library = torch_cuda.kernels()
        assert library is not None
        library.sample(SampleParams(**{**values, **changes}), torch.cuda.current_stream().cuda_stream)
        return token.tolist()


def sampled(sampler: Sampler, logits: np.ndarray) -> Choice:
    choice = sampler.choose(logits)
    sampler.note(choice.token)
    return choice


def logits_of(rows: int, vocab: int, dtype: torch.dtype, seed: int, spread: float = 3.0) -> torch.Tensor:
    """[rows, vocab] in rows that are longer, with NaN behind."""
    padded = torch.full((rows, vocab + 3), float("nan"), dtype=dtype, device="cuda")
    made = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread
    padded[:, :vocab] = made.to(dtype)
    return padded[:, :vocab]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_tokens_of_the_sampler(vocab: int, dtype: torch.dtype) -> None:
    """Weights differ in the last bits of exp(): some 2^-22 of draws could differ, none of these few hundred does."""
    options = [GenerationOptions(seed=90 + i, logprobs=True, **given) for i, given in enumerate(OPTIONS)]
    call = Sampling(options, vocab)
    excluded = [0, vocab // 2, vocab - 1] if vocab > 5 else []
    samplers = [Sampler(one, vocab, excluded) for one in options]
    seen = list(range(3, vocab, 7))
    for row, sampler in enumerate(samplers):
        call.exclude(row, excluded)
        call.see(row, seen)
        sampler.observe(seen)
    for step in range(6 if vocab > 5 else 2):
        logits = logits_of(len(options), vocab, dtype, step)
        if vocab > 40:
            logits[:, 5] = 11.0  # often the likeliest, with an equal
            logits[:, 39] = 11.0
        found = call.run(logits, step)
        choices = [sampled(sampler, row) for sampler, row in zip(samplers, logits.float().cpu().numpy(), strict=True)]
        assert found == [choice.token for choice in choices]
        assert call.last[call.slot.long()].tolist() == found
        np.testing.assert_allclose(
            call.probability.cpu().numpy(), [choice.log_probability for choice in choices], rtol=1e-5, atol=1e-5
        )
    assert (call.last == -7).sum() == call.slots - len(options)  # of other slots


def test_flat_logits_and_many_equal_ones() -> None:
    """Thousands of equal scores: they stay together, and memory of candidates does not run over."""
    for given in ({"top_p": 0.5}, {"top_k": 10}, {"top_k": 100, "top_p": 0.3}):
        options = GenerationOptions(temperature=1.0, seed=3, **given)
        call, sampler = Sampling([options], 50000), Sampler(options, 50000)
        levels = torch.arange(50000, device="cuda") % 3
        for step, logits in enumerate((torch.zeros(1, 50000, device="cuda"), (levels * 0.01)[None])):
            assert call.run(logits, step) == [sampled(sampler, logits[0].cpu().numpy()).token]


def test_frequencies_follow_the_softmax() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0], device="cuda").expand(512, 5).contiguous()
    call = Sampling([GenerationOptions(temperature=2.5, seed=seed) for seed in range(512)], 5)
    found = np.concatenate([call.run(logits, step) for step in range(20)])
    expected = torch.softmax(logits[0] / 2.5, 0).cpu().numpy()
    np.testing.assert_allclose(np.bincount(found, minlength=5) / len(found), expected, atol=0.02)


def test_a_row_does_not_depend_on_the_others() -> None:
    options = [GenerationOptions(temperature=1.0, top_p=0.9, seed=seed) for seed in range(40)]
    logits = logits_of(40, 32064, torch.float16, 5)
    together = Sampling(options, 32064).run(logits, 4)
    assert together == [Sampling([one], 32064).run(logits[i : i + 1], 4)[0] for i, one in enumerate(options)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_no_numbers(bad: float, temperature: float) -> None:
    options = [GenerationOptions(temperature=temperature, top_p=0.9)] * 3
    call, logits = Sampling(options, 5000), logits_of(3, 5000, torch.float32, 1)
    expected = call.run(logits, 0)
    logits[1, 4321] = bad
    again = Sampling(options, 5000)
    assert again.run(logits, 0) == [expected[0], -1, expected[2]]
    assert again.last[again.slot.long()].tolist() == [expected[0], 0, expected[2]]
    assert again.seen[again.slot[1]].count_nonzero() == 0
    call = Sampling(options, 5000)
    for row in range(3):
        call.exclude(row, range(5000))
    assert call.run(logits_of(3, 5000, torch.float32, 1), 0) == [-2, -2, -2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": 3}, "dtype is 3"),
        ({"vocab": 0}, "vocab is 0"),
        ({"logits_stride": 1}, "logits_stride is 1"),
        ({"rows": -1}, "rows is -1"),
        ({"seen": 0}, "seen is a null pointer"),
    ],
)
def test_bad_calls_are_refused(changes: dict[str, int], message: str) -> None:
    call = Sampling([GenerationOptions()], 100)
    with pytest.raises(OptionError, match=message):
        call.run(logits_of(1, 100, torch.float32, 0), 0, **changes)


def test_idle_rows_stay_as_they_are() -> None:
    """Rows of slot -1, which an engine's batch is padded with, whatever their logits and options hold."""
    options = [GenerationOptions(temperature=1.0, top_p=0.9, seed=seed) for seed in range(3)]
    logits = logits_of(3, 5000, torch.float32, 2)
    expected = Sampling(options, 5000).run(logits, 1)
    call = Sampling(options, 5000)
    call.slot[1] = -1
    logits[1] = float("nan")
    assert call.run(logits, 1) == [expected[0], -9, expected[2]]
    assert (call.last >= 0).sum() == call.seen.count_nonzero() == 2


def test_last_tokens_of_slots_are_fed() -> None:
    library, stream = torch_cuda.kernels(), torch.cuda.current_stream().cuda_stream
    assert library is not None
    rng = np.random.default_rng(3)
    for rows in (1, 127, 300):
        slot, last = rng.permutation(rows + 4)[:rows] - 2, rng.integers(0, 1 << 19, rows + 2)
        slot[slot < 0] = -1
        ids = np.where(rng.random(rows) < 0.5, -1, rng.integers(0, 99, rows))
        on_device = [torch.from_numpy(array.astype(np.int32)).cuda() for array in (slot, last, ids)]
        library.last_tokens(rows, *(tensor.data_ptr() for tensor in on_device), stream)
        expected = np.where((ids < 0) & (slot >= 0), last[slot], ids)
        assert on_device[2].tolist() == expected.tolist()
    with pytest.raises(OptionError, match="rows is -1"):
        library.last_tokens(-1, *(tensor.data_ptr() for tensor in on_device), stream)
    with pytest.raises(OptionError, match="is a null pointer"):
        library.last_tokens(1, 0, 0, 0, stream)
