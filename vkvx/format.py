"""Constants and defaults of the packed format, version 1, for code with and without torch. See ``docs/format.md``."""

from __future__ import annotations

from collections.abc import Sequence

from vkvx.errors import OptionError

OPERATOR_VERSION = 1
"""Of ``vkvx::VisualKVAttention``, see ``docs/operator.md``."""
TILE = 128
"""Visual tokens per tile; group sizes and capacities are multiples of it."""
WORD_BITS = 32
BITS = (1, 2, 4, 8)
BASELINE_BITS = 16
"""Stands for the unquantised baseline, which stores visual tokens with the text; for a whole model only."""
TEXT_BITS = (16, 8)
"""Of text rows: 16 stands for the model's float type, 8 for codes with a scale for each token and KV head."""
TEXT_TOP = 127
"""The largest code of a text row of 8 bits; the least is its negative."""
TEXT_SCALE_MOST = 515.5
"""The largest scale of such a row: the largest whose product with that code is an FP16 number when it is rounded."""
QUANTIZERS = ("minmax", "quantile", "shrink", "lloyd", "shaped")
"""Names in the order of their numbers in the C interface: a new one comes last."""
METRIC_QUANTIZERS = ("shaped",)
"""Quantisers that need the metrics of keys and values; see ``docs/format.md``."""
LLOYD_ITERATIONS = 8
SHAPED_STEP = {1: 2.3, 2: 1.0, 4: 0.33, 8: 1.0}
"""Distance of two levels of ``shaped`` in standard deviations of a channel, by bits. At 8 bits all of the range."""
SHAPED_FLAT_STEP, SHAPED_STEP_SLOPE = 1.6, 5.0
"""At 1 bit the distance for the metric of plain distance, and how fast it grows to the above with other metrics."""
SCORE_CORRECTIONS = ("none", "affine", "expected")
"""Ordered likewise."""
VISUAL_MASKS = ("causal", "run", "prefix")
"""Which tokens of its own call a position sees; see ``docs/operator.md``. Ordered likewise."""
CACHE_NAMES = ("visual_key", "visual_key_params", "visual_value", "visual_value_params", "text_key", "text_value")
"""Cache tensors of a layer, in the order of the operator's outputs."""
STATE_NAMES = ("conv_state", "recurrent_state")
"""Those of a layer of linear attention."""

MAX_AUTO_GROUP = 1024
_PARAMS = 40
"""Bits of a group's parameters per channel, mean of keys (3 of FP16) and values (2)."""

QUANTILE_ALPHA = {1: 0.2, 2: 0.07, 4: 0.005, 8: 0.0}
"""Default tail that ``quantile`` cuts off on each side, by bits."""
SHRINK_KEY = {1: 0.5, 2: 1.0, 4: 1.0, 8: 1.0}
"""Default factor of ``shrink`` on the minimum and maximum of keys, by bits."""
SHRINK_VALUE = {1: 0.3, 2: 1.0, 4: 1.0, 8: 1.0}
"""The same for values."""


def check_bits(bits: int) -> None:
    """Raise OptionError unless a code may have this many bits."""
    if bits not in BITS:
        raise OptionError(f"{bits} bits a code are not supported: give one of {', '.join(map(str, BITS))}")


def check_text_bits(text_bits: int, key_bits: int) -> None:
    """Raise OptionError unless text rows beside key codes of so many bits may have ``text_bits``."""
    if text_bits not in TEXT_BITS:
        raise OptionError(f"text bits {text_bits} are not supported: give one of {', '.join(map(str, TEXT_BITS))}")
    if text_bits != BASELINE_BITS and key_bits == BASELINE_BITS:
        raise OptionError(f"text bits {text_bits} need packed pictures: give fewer than {BASELINE_BITS} bits a code")


def text_words(head_dim: int) -> int:
    """INT32 words of a text row of 8 bits: four codes a word, and one with the scale."""
    return head_dim // 4 + 1


def check_quantizer(quantizer: str) -> None:
    """Raise OptionError for an unknown quantiser."""
    if quantizer not in QUANTIZERS:
        raise OptionError(f"unknown quantizer '{quantizer}': give one of {', '.join(QUANTIZERS)}")


def check_group_size(group_size: int) -> None:
    """Raise OptionError unless groups of this many tokens consist of whole tiles."""
    if group_size <= 0 or group_size % TILE:
        raise OptionError(f"group size {group_size} is not supported: give a positive multiple of {TILE}")


def auto_group_size(tokens_per_picture: int | None) -> int:
    """Group size with little padding and at most 1024 tokens; 256 for pictures of any size (``None``)."""
    if tokens_per_picture is None:
        return 256
    tiles = -(-tokens_per_picture // TILE)
    groups = -(-tiles // 8)
    return TILE * -(-tiles // groups)


def typical_group_size(typical_tokens: Sequence[int]) -> int:
    """The same for pictures of several sizes: the least padding on average over these numbers of visual tokens."""
    if len(typical_tokens) == 1:
        return auto_group_size(typical_tokens[0])
    # Bytes per token at 1 bit, averaged over the pictures; of equal sizes the larger.
    costs = {
        size: sum(-(-tokens // size) * (size + _PARAMS) / tokens for tokens in typical_tokens)
        for size in range(MAX_AUTO_GROUP, 0, -TILE)
    }
    return min(costs, key=costs.__getitem__)
