"""Options of an export: what is refused, and what the rest means for a model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from vkvx.errors import OptionError
from vkvx.export.options import ExportOptions
from vkvx.options import parse_bits_per_layer
from vkvx.plugins.operator import layer_attributes


@pytest.mark.parametrize(
    ("text", "layers", "expected"),
    [
        ("0:8", 3, {0: 8}),
        ("0-1:8,2-:1", 4, {0: 8, 1: 8, 2: 1, 3: 1}),
        ("1-1:2", 2, {1: 2}),
        (" 2:4 , 0:1 ", 3, {0: 1, 2: 4}),
        ("3-:2", 4, {3: 2}),
    ],
)
def test_bits_per_layer(text: str, layers: int, expected: dict[int, int]) -> None:
    assert parse_bits_per_layer(text, layers) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0:16", "whole model"),
        ("0:3", "give 1, 2, 4 or 8"),
        ("", "not understood"),
        ("0", "not understood"),
        ("0:", "not understood"),
        ("-1:8", "not understood"),
        ("0-1:8,", "not understood"),
        ("0:8;1:2", "not understood"),
        ("a:8", "not understood"),
        ("2-1:8", "ends before it starts"),
        ("0-1:8,1:2", "layer 1 twice"),
        ("0-:8,3:1", "layer 3 twice"),
        ("4:8", "layer 4; the model has layers 0 to 3"),
        ("4-:8", "layer 4; the model has layers 0 to 3"),
        ("0-999999999999:8", "the model has layers 0 to 3"),
    ],
)
def test_bits_per_layer_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_bits_per_layer(text, 4)


def test_grammar_is_checked_before_the_model_is_known() -> None:
    with pytest.raises(OptionError, match="whole model"):
        ExportOptions(bits_per_layer="0:16").check()
    ExportOptions(bits_per_layer="0-99:8,100-:1").check()
    with pytest.raises(OptionError, match="layers 0 to 3"):
        ExportOptions(bits_per_layer="0-99:8").resolve(4, (576,))


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3},
        {"bits": 0},
        {"key_bits": 5},
        {"key_bits": 16},
        {"value_bits": 16},
        {"bits": 16, "key_bits": 1},
        {"bits": 16, "bits_per_layer": "0:8"},
        {"bits": 16, "quantizer": "lloyd"},
        {"bits": 16, "score_correction": "none"},
        {"bits": 16, "tau": 1.0},
        {"group_size": 100},
        {"group_size": 0},
        {"group_size": -128},
        {"group_size": "big"},
        {"quantizer": "magic"},
        {"score_correction": "magic"},
        {"quantile_alpha": 0.1},
        {"quantile_alpha": 0.1, "quantizer": "lloyd"},
        {"quantile_alpha": 0.5, "quantizer": "quantile"},
        {"quantile_alpha": -0.1, "quantizer": "quantile"},
        {"quantile_alpha": float("nan"), "quantizer": "quantile"},
        {"tau": 1.0},
        {"tau": -1.0, "score_correction": "affine"},
        {"tau": float("inf"), "score_correction": "affine"},
        {"correction_limit": 1.0, "score_correction": "none"},
        {"correction_limit": 0.0},
        {"correction_limit": float("inf")},
        {"dtype": "int8"},
        {"opset": 16},
        {"opset": 99},
    ],
)
def test_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        ExportOptions(**options).check()
    assert "\n" not in str(caught.value)


def test_defaults() -> None:
    q = ExportOptions().resolve(2, (576,))
    assert asdict(q) == {
        "key_bits": (1, 1),
        "value_bits": (1, 1),
        "group_size": 640,
        "quantizer": "shaped",
        "quantile_alpha_key": (0.2, 0.2),
        "quantile_alpha_value": (0.2, 0.2),
        "shrink_key": (0.5, 0.5),
        "shrink_value": (0.3, 0.3),
        "score_correction": "expected",
        "tau": 3.0,
        "correction_limit": 3.0,
        "text_bits": 16,
    }


def test_parameters_follow_the_bits_of_each_layer() -> None:
    options = ExportOptions(key_bits=2, value_bits=4, bits_per_layer="1:1", quantizer="quantile", group_size=256)
    q = options.resolve(3, (576,))
    assert (q.key_bits, q.value_bits) == ((2, 1, 2), (4, 1, 4))
    assert q.quantile_alpha_key == (0.07, 0.2, 0.07)
    assert q.quantile_alpha_value == (0.005, 0.2, 0.005)
    assert q.shrink_value == (1.0, 0.3, 1.0)
    assert q.group_size == 256
    attributes = layer_attributes(q, 0.125)
    assert [(a.key_bits, a.value_bits, a.quantile_alpha_value) for a in attributes] == [
        (2, 4, 0.005),
        (1, 1, 0.2),
        (2, 4, 0.005),
    ]
    assert {a.scale for a in attributes} == {0.125}


def test_quantile_alpha_holds_for_keys_and_values() -> None:
    q = ExportOptions(quantizer="quantile", quantile_alpha=0.0, bits_per_layer="0:8").resolve(2, (576,))
    assert q.quantile_alpha_key == q.quantile_alpha_value == (0.0, 0.0)


def test_baseline() -> None:
    for options in (ExportOptions(bits=16), ExportOptions(key_bits=16, value_bits=16)):
        q = options.resolve(2, (576,))
        assert q.key_bits == q.value_bits == (16, 16)
        assert not any(a.is_packed for a in layer_attributes(q, 1.0))


def test_corrections_take_their_numbers() -> None:
    assert ExportOptions(score_correction="affine", tau=1).resolve(1, (576,)).tau == 1.0
    assert ExportOptions(correction_limit=2).resolve(1, (576,)).correction_limit == 2.0
    assert ExportOptions(score_correction="expected", correction_limit=2).resolve(1, (256,)).group_size == 256
