"""What generation_config.json asks for: rules that a bundle keeps, and those that nothing here can follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from vkvx import typed_json
from vkvx.sampling import RANGES, RULES, GenerationInfo

SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
"""Rules that count with ``do_sample`` only, and what ``generate()`` takes without them."""
UNSUPPORTED_SAMPLING = {
    **dict.fromkeys(("min_p", "top_h", "epsilon_cutoff", "eta_cutoff"), 0.0),
    "typical_p": 1.0,
}
"""Of those that nothing here follows: the value that changes nothing."""
UNSUPPORTED = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "encoder_repetition_penalty", "guidance_scale"), 1),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "min_length", "penalty_alpha"), 0),
    **dict.fromkeys(("constraints", "dola_layers", "exponential_decay_length_penalty", "force_words_ids"), None),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "max_time", "sequence_bias"), None),
    **dict.fromkeys(("token_healing", "watermarking_config"), None),
}
"""Of rules that nothing here follows and that count always: the value that changes nothing."""


def generation_info(given: Mapping[str, Any], fail: Callable[[str], Exception]) -> GenerationInfo:
    """The contents of generation_config.json as what a manifest keeps; raises what ``fail`` makes of wrong ones."""
    sampled = bool(given.get("do_sample"))
    found = {entry.name: entry.default for entry in fields(GenerationInfo)}
    for name in RULES:
        value = given.get("stop_strings" if name == "stop" else name)
        if name in SAMPLING and not sampled:
            continue
        if value is not None:
            found[name] = [value] if name == "stop" and isinstance(value, str) else value
        elif name in SAMPLING:
            found[name] = SAMPLING[name]
    neutral = {**UNSUPPORTED, **(UNSUPPORTED_SAMPLING if sampled else {})}
    found["ignored"] = [name for name in sorted(neutral) if given.get(name) not in (None, False, neutral[name])]
    info = typed_json.read(GenerationInfo, found, fail)
    for name, (valid, expected) in RANGES.items():
        if not valid(getattr(info, name)):
            raise fail(f"{name} must be {expected}, got {getattr(info, name)!r}")
    return info
