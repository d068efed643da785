"""What is taken over from generation_config.json, what is named, and what is refused."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from vkvx.errors import ModelError
from vkvx.models.generation_config import SAMPLING, UNSUPPORTED, UNSUPPORTED_SAMPLING, generation_info
from vkvx.models.registry import TINY_LLAVA, resolve
from vkvx.runtime.sessions.sampling import GenerationOptions
from vkvx.sampling import RANGES, RULES, GenerationInfo, SamplingRules

WITHOUT_EFFECT = {
    *("max_length", "max_new_tokens"),  # the caller says how long an answer may be
    *("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory", "prefill_chunk_size"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("early_stopping", "length_penalty", "diversity_penalty"),  # of beams
    *("num_return_sequences", "renormalize_logits", "remove_invalid_values"),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
    *("target_lookbehind", "assistant_ensemble_weight", "speculation_type", "use_mtp"),
    *("compile_config", "disable_compile", "continuous_batching_config", "transformers_version", "_from_model_config"),
}
"""Keys that change no token of an answer."""


def info(**given: Any) -> GenerationInfo:
    return generation_info(given, ModelError)


def test_every_key_of_transformers_is_known() -> None:
    """A new release may add one: it is followed, named as left out, or without effect."""
    followed = {"do_sample", *RULES} - {"stop"} | {"stop_strings"}
    known = followed | UNSUPPORTED.keys() | UNSUPPORTED_SAMPLING.keys() | WITHOUT_EFFECT
    assert set(GenerationConfig().to_dict()) - known == set()


def test_rules_have_ranges_and_are_options() -> None:
    assert set(RANGES) == set(RULES)
    assert {entry.name for entry in fields(GenerationOptions)} >= set(RULES)
    assert all(valid(getattr(SamplingRules(), name)) for name, (valid, _) in RANGES.items())


def test_what_transformers_takes_by_itself_is_plain() -> None:
    defaults = GenerationConfig._get_default_generation_params()
    assert info(**defaults) == info(**dict.fromkeys(defaults)) == info() == GenerationInfo()
    assert {name: defaults[name] for name in SAMPLING} == SAMPLING
    assert info(do_sample=True).rules() == {"temperature": 1.0, "top_k": 50}
    source = resolve("tiny-llava")
    assert source.generation() == GenerationInfo()


def test_rules_are_taken_over() -> None:
    given = {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "repetition_penalty": 1.05,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 4,
        "suppress_tokens": [7],
        "begin_suppress_tokens": [2, 8],
        "bad_words_ids": [[5], [6, 7]],
        "stop_strings": "###",
    }
    found = info(do_sample=True, **given)
    assert found.rules() == {
        **{name: value for name, value in given.items() if name != "stop_strings"},
        "suppress_tokens": (7,),
        "begin_suppress_tokens": (2, 8),
        "bad_words_ids": ((5,), (6, 7)),
        "stop": ("###",),
    }
    GenerationOptions(**found.rules())
    greedy = info(**given)
    assert greedy.temperature == 0
    assert (greedy.top_k, greedy.top_p, greedy.ignored) == (0, 1.0, ())


def test_what_is_left_out_is_named() -> None:
    assert info(num_beams=4, min_p=0.1, guidance_scale=1, forced_eos_token_id=2).ignored == (
        "forced_eos_token_id",
        "num_beams",
    )
    assert info(do_sample=True, min_p=0.1, typical_p=1.0, epsilon_cutoff=0.0).ignored == ("min_p",)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"repetition_penalty": "much"}, "repetition_penalty must be a number, got 'much'"),
        ({"repetition_penalty": 0}, "repetition_penalty must be between 1e-30 and 1e30"),
        ({"do_sample": True, "top_p": 2.0}, "top_p must be above 0 and at most 1, got 2.0"),
        ({"suppress_tokens": 5}, "suppress_tokens must be a list"),
        ({"suppress_tokens": [-1]}, "suppress_tokens must be token ids"),
        ({"bad_words_ids": [[]]}, "bad_words_ids must be lists of token ids"),
        ({"min_new_tokens": 1.5}, "min_new_tokens must be an integer"),
    ],
)
def test_nonsense_is_refused(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    (tmp_path / "config.json").write_bytes((TINY_LLAVA / "config.json").read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    with pytest.raises(ModelError, match=rf"generation_config\.json: {words}.*; correct it") as caught:
        resolve(tmp_path).generation()
    assert "\n" not in str(caught.value)
