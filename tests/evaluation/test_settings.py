"""Which settings an evaluation runs: lists of values, their product, explicit ones, names, and what is refused."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from vkvx import ExportOptions, OptionError
from vkvx.cli.eval import HELP
from vkvx.evaluation import settings
from vkvx.format import QUANTIZERS, SCORE_CORRECTIONS

LAYERS, TOKENS = 4, (576,)


def names(options: list[ExportOptions]) -> list[str]:
    return [setting.name for setting in settings.settle(options, LAYERS, TOKENS)]


def test_every_field_of_the_cache_is_an_option_and_explained() -> None:
    others = {"dtype", "opset", "force", "cache_dir", "revision", "trust_remote_code", "min_pixels", "max_pixels"}
    assert set(HELP) == set(settings.FIELDS) == {f.name for f in fields(ExportOptions)} - others


def test_the_default_is_four_two_one() -> None:
    assert names(settings.product({})) == [
        "16 bits",
        "4 bits, shaped, expected",
        "2 bits, shaped, expected",
        "1 bit, shaped, expected",
    ]


def test_the_product_has_each_combination_once() -> None:
    found = settings.product({"bits": [16, 2, 1], "quantizer": QUANTIZERS, "score_correction": SCORE_CORRECTIONS})
    assert len(found) == 1 + 2 * len(QUANTIZERS) * len(SCORE_CORRECTIONS)
    assert len(set(found)) == len(found)
    assert found[0] == ExportOptions(bits=16)


def test_options_without_effect_make_combinations_one() -> None:
    found = settings.product(
        {"bits": [1], "score_correction": ["none", "affine", "expected"], "tau": [1.0, 2.0], "correction_limit": [4.0]}
    )
    assert found == [
        ExportOptions(score_correction="none"),
        ExportOptions(score_correction="affine", tau=1.0),
        ExportOptions(score_correction="affine", tau=2.0),
        ExportOptions(score_correction="expected", correction_limit=4.0),
    ]


def test_what_the_model_cannot_tell_apart_is_one_setting() -> None:
    """640 is what auto gives for 576 tokens, shaped and 3 are the defaults."""
    given = [
        ExportOptions(),
        ExportOptions(group_size=640),
        ExportOptions(quantizer="shaped"),
        ExportOptions(correction_limit=3.0),
        ExportOptions(key_bits=1, value_bits=1),
        ExportOptions(bits_per_layer="0-3:1"),
        ExportOptions(bits=16),
    ]
    assert names(given) == ["16 bits", "1 bit, shaped, expected"]


def test_the_reference_comes_first_and_once() -> None:
    found = settings.settle([ExportOptions(bits=2), ExportOptions(bits=16)], LAYERS, TOKENS)
    assert [setting.reference for setting in found] == [True, False]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"bits": 8, "quantizer": "minmax", "score_correction": "none"}, "8 bits, minmax, none"),
        ({"key_bits": 2, "value_bits": 1}, "keys 2 bits, values 1 bit, shaped, expected"),
        ({"bits_per_layer": "0:8,2-:4"}, "8 bits in 0, 1 bit in 1, 4 bits in 2-3, shaped, expected"),
        ({"group_size": 256, "correction_limit": 2.0}, "1 bit, shaped, expected, group size 256, correction limit 2.0"),
    ],
)
def test_names(options: dict[str, Any], name: str) -> None:
    assert names([ExportOptions(**options)])[1] == name


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"bits": [1], "tau": [2.0]}, r"tau= \(--tau\) has no effect with expected"),
        (
            {"bits": [1], "score_correction": ["affine"], "correction_limit": [2.0]},
            r"\(--correction-limit\) has no effect",
        ),
        ({"bits": [16], "group_size": [256]}, r"group_size= \(--group-size\) has no effect at 16 bits"),
        ({"bits": [16], "quantizer": ["minmax"]}, r"quantizer= \(--quantizer\) has no effect at 16 bits"),
        (
            {"bits": [2, 4], "key_bits": [1], "value_bits": [2]},
            r"bits= \(--bits\) has no effect where key_bits= and value_bits=",
        ),
        ({"bits": [3]}, "3 bits are not supported"),
        ({"quantizer": ["best"]}, "unknown quantizer 'best'"),
    ],
)
def test_refused(values: dict[str, list[Any]], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        settings.product(values)


def test_explicit_settings() -> None:
    assert settings.parse_setting("bits=1,quantizer=shrink, score-correction=affine,tau=2") == ExportOptions(
        quantizer="shrink", score_correction="affine", tau=2.0
    )
    assert settings.parse_setting("bits_per_layer=0:8,2-:1,group-size=256") == ExportOptions(
        bits_per_layer="0:8,2-:1", group_size=256
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bits", "'bits' in --setting is not understood"),
        ("dtype=float16", "'dtype=float16' in --setting"),
        ("bits=1,bits=2", "gives bits twice"),
        ("bits=one", "--bits 'one' is not understood; give an integer"),
        ("tau=x", "--tau 'x' is not understood; give a number"),
        ("bits=1,tau=2", r"tau= \(--tau\) has no effect with expected"),
        ("bits=16,group-size=256", r"group_size= \(--group-size\) has no effect at 16 bits"),
    ],
)
def test_explicit_settings_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        settings.parse_setting(text)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 16},
        {"bits": 2, "quantizer": "quantile", "quantile_alpha": 0.1, "score_correction": "affine", "tau": 1.0},
        {"key_bits": 4, "value_bits": 2, "bits_per_layer": "0:8,3:1", "group_size": 256},
        {"bits_per_layer": "0-2:8", "quantizer": "shrink", "correction_limit": 2.0},
    ],
)
def test_options_of_a_bundle_give_its_quantisation(options: dict[str, Any]) -> None:
    quantization = ExportOptions(**options).resolve(LAYERS, TOKENS)
    assert settings.options_of(quantization, TOKENS).resolve(LAYERS, TOKENS) == quantization


def test_json_names_bits_and_what_is_not_default() -> None:
    (_, setting) = settings.settle([ExportOptions(quantizer="minmax")], LAYERS, TOKENS)
    assert setting.to_json() == {"bits": 1, "quantizer": "minmax"}
