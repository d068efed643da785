"""The comparison of methods: exact loses nothing, and its simulated caches decode as the product's packed ones do."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks.cases import methods
from benchmarks.cases.methods import Study
from benchmarks.lib.simulation import TOKENS, PageBatch
from vkvx import OptionError, quantize_visual_cache
from vkvx.evaluation.tasks import DIGITS_PROMPT, Sample, prompt_of
from vkvx.models.registry import resolve
from vkvx.models.tiny_llava import data
from vkvx.runtime.backends.torch.loading import load_model

SEEDS = (5000, 5001)
PRODUCT = {
    "lloyd": {"quantizer": "lloyd", "score_correction": "none"},
    "lloyd + expected 3": {"quantizer": "lloyd", "score_correction": "expected"},
    "shrink + affine 3": {"quantizer": "shrink", "score_correction": "affine"},
}


@pytest.fixture(scope="module")
def study() -> Study:
    return Study()


@pytest.fixture(scope="module")
def batch(study: Study) -> PageBatch:
    return study.simulation.batch(SEEDS, "test")


def product_tokens(study: Study, **options: str) -> torch.Tensor:
    """Tokens [B, n] of generate() over the packed cache, with the end's token as padding."""
    processor = study.simulation.processor
    model = load_model(resolve("tiny-llava"), torch.float32)
    ids, pixels = [], []
    for seed in SEEDS:
        sample = Sample(seed, DIGITS_PROMPT, (data.page(seed, "test").image,), ())
        prepared = processor.prepare(prompt_of(sample, processor), sample.pictures)
        ids.append(torch.from_numpy(prepared.token_ids).long())
        pixels.append(torch.from_numpy(prepared.vision_calls[0]["pixel_values"]))
    with quantize_visual_cache(model, 1, **options):
        output = model.generate(
            input_ids=torch.stack(ids), pixel_values=torch.cat(pixels), max_new_tokens=TOKENS, do_sample=False
        )
    return output[:, len(ids[0]) :]


@pytest.mark.parametrize("name", PRODUCT)
def test_tokens_are_those_of_the_product(study: Study, batch: PageBatch, name: str) -> None:
    tokens = study.simulation.answer(batch, methods.methods(study)[name].technique())
    expected = product_tokens(study, **PRODUCT[name])
    assert study.simulation.texts(tokens) == study.simulation.texts(expected)
    assert tokens[:, : expected.shape[1]].tolist() == expected.tolist()


def test_the_reference_is_the_model(study: Study, batch: PageBatch) -> None:
    """The simulated 16-bit model answers as transformers does, and takes all tokens up to an answer's end."""
    ends = study.simulation.info.eos_token_ids
    assert batch.tokens.shape == (len(SEEDS), TOKENS)
    assert batch.live.all()
    assert all(int(token) in ends for token in batch.tokens[:, -1])
    model = load_model(resolve("tiny-llava"), torch.float32)
    processor = study.simulation.processor
    sample = Sample(0, DIGITS_PROMPT, (data.page(SEEDS[0], "test").image,), ())
    prepared = processor.prepare(prompt_of(sample, processor), sample.pictures)
    ids = torch.cat([torch.from_numpy(prepared.token_ids).long(), batch.tokens[0, :-1]])[None]
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=torch.from_numpy(prepared.vision_calls[0]["pixel_values"])).logits
    logits[..., study.simulation.info.image_token_id] = -1e30
    found = logits[0, len(prepared.token_ids) :].log_softmax(-1)
    torch.testing.assert_close(found.exp(), batch.expected[0].exp(), rtol=0, atol=1e-4)


def test_rows() -> None:
    """Exact has no divergence at all; a quantised cache has, and fewer bits."""
    parser = argparse.ArgumentParser()
    methods.add_arguments(parser)
    rows = methods.run(
        parser.parse_args(["--pages", "2", "--threads", "1", "--only", "exact,lloyd,lloyd layer 3 keys at 2"])
    )
    exact, lloyd, layer = rows
    assert (exact["kl"], exact["agreement"], exact["attention_error"], exact["projected_error"]) == (0, 1, 0, 0)
    assert exact["bits_per_element"] == 16
    assert 0.001 < lloyd["kl"] < 1
    assert 0 < lloyd["projected_error"] < 1
    # 85 KiB for 576 tokens of 4 layers with 2 heads of 64 channels; ``docs/format.md``.
    assert lloyd["bits_per_element"] == pytest.approx(85 * 1024 * 8 / (576 * 4 * 2 * 2 * 64), abs=1e-3)
    assert (lloyd["key_bits"], layer["key_bits"], layer["value_bits"]) == (1, 1.25, 1)
    assert layer["kl"] < lloyd["kl"]
    assert layer["digits"] == "-"


def test_unknown_names_are_refused() -> None:
    parser = argparse.ArgumentParser()
    methods.add_arguments(parser)
    with pytest.raises(OptionError, match="there is no method 'loyd'; give --only names of the table, such as lloyd"):
        methods.run(parser.parse_args(["--only", "loyd"]))
    with pytest.raises(OptionError, match="--pages 0 is not supported"):
        methods.run(parser.parse_args(["--pages", "0"]))


def test_the_metric_of_the_product_is_the_long_window(study: Study, batch: PageBatch) -> None:
    """What the table calls weights at offset 0 is what the product uses, up to FP16."""
    own = study.window_metric(methods.LONG, 0, methods.FLOOR)
    for layer in batch.layers:
        torch.testing.assert_close(own(layer), study.product_key_metric(layer), rtol=0, atol=5e-3)
        values = study.value_metric(methods.FLOOR)(layer)
        torch.testing.assert_close(values, study.product_value_metric(layer), rtol=0, atol=5e-3)


def test_hadamard_of_the_mean_changes_nothing_for_lloyd(study: Study, batch: PageBatch) -> None:
    """Offsets are free, so taking out the mean of a channel before or after the rotation is the same."""
    table = methods.methods(study)
    plain, centred = (
        study.simulation.measure(batch, table[name].technique()).kl
        for name in ("hadamard lloyd", "hadamard lloyd centred")
    )
    torch.testing.assert_close(plain, centred, rtol=0.1, atol=1e-3)
