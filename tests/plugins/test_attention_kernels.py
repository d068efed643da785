"""The attention kernels against float64, with poison wherever nothing may be read, and what they must not depend on."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from kernel_calls import Case, attend, error, make, reference

from vkvx.errors import OptionError
from vkvx.plugins.torch_op import visual_kv_attention_

pytestmark = [pytest.mark.gpu, pytest.mark.kernels]

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 5e-6}
CORRECTIONS = ("none", "expected", "affine")
BITS = (1, 2, 4, 8)
SHAPES = [(1, 1), (4, 1), (7, 1), (3, 3), (12, 1), (1, 8), (2, 2)]  # query heads a KV head, positions


def compare(case: Case, kernel: str, splits: int = 0, tolerance: float | None = None) -> None:
    tensors = make(case)
    off = error(attend(tensors, case.attributes, kernel, splits), reference(tensors, case.attributes))
    assert off < (tolerance or TOLERANCE[case.dtype]), f"{kernel}, {splits} splits, {case}: {off:.2e}"


@pytest.mark.parametrize(("key_bits", "value_bits"), list(itertools.product(BITS, BITS)))
@pytest.mark.parametrize("head_dim", [96, 128])
def test_codes(key_bits: int, value_bits: int, head_dim: int) -> None:
    for i, (ratio, positions) in enumerate(SHAPES):
        correction = CORRECTIONS[(i + key_bits + value_bits) % 3]
        dtype = torch.bfloat16 if (i + key_bits) % 4 == 0 else torch.float16
        case = Case(key_bits, value_bits, head_dim, 2, ratio, positions, correction, dtype)
        compare(case, "codes", (0, 1, 3)[i % 3])


@pytest.mark.parametrize("head_dim", [32, 64, 160, 192, 224, 256])
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_codes_of_any_head_dim(head_dim: int, correction: str) -> None:
    for i, (key_bits, value_bits) in enumerate([(1, 1), (2, 2), (4, 4), (8, 8), (1, 4), (8, 2), (2, 8), (4, 1)]):
        ratio, positions = SHAPES[(i + head_dim // 32) % len(SHAPES)]
        dtype = torch.bfloat16 if i % 3 == 0 else torch.float16
        compare(Case(key_bits, value_bits, head_dim, 2, ratio, positions, correction, dtype), "codes", (0, 1, 2)[i % 3])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("ratio", [4, 7])
def test_codes_of_long_groups(bits: int, ratio: int) -> None:
    """A warp sums 300 tiles of one group, of weights near 1 and the largest codes."""
    tokens = 4 * 300 * 128
    case = Case(bits, bits, 128, 1, ratio, counts=[[tokens - 60]], text=[10], group_size=tokens, groups=1, slots=1)
    tensors = make(case)
    tensors["query"] = tensors["query"] * 1e-3
    tensors["visual_value"].fill_(-1)
    assert error(attend(tensors, case.attributes, "codes", 1), reference(tensors, case.attributes)) < 1e-3


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("correction", ["none", "expected"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_planes(bits: int, correction: str, dtype: torch.dtype) -> None:
    for ratio, positions in SHAPES:
        for splits in (0, 1, 4):
            compare(Case(bits, bits, 128, 2, ratio, positions, correction, dtype), "planes", splits)


@pytest.mark.parametrize(("key_bits", "value_bits"), list(itertools.product(BITS, BITS)))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_few(key_bits: int, value_bits: int, dtype: torch.dtype) -> None:
    for i, (ratio, splits) in enumerate(itertools.product((1, 4, 7, 10), (0, 1, 2, 8))):
        correction = ("none", "expected")[(i + i // 4) % 2]
        compare(Case(key_bits, value_bits, 128, 2, ratio, correction=correction, dtype=dtype), "few", splits)


@pytest.mark.parametrize("text_bits", [16, 8])
@pytest.mark.parametrize("bits", BITS)
def test_few_of_long_parts(bits: int, text_bits: int) -> None:
    """Parts that a block takes in several rounds, the longest of pictures or of text, in whole and odd groups."""
    counts = [[384] * 11 + [1], [384, 200] * 6, [], [384] * 3]
    case = Case(bits, bits, ratio=4, group_size=384, groups=12, counts=counts, text=[3, 640, 555, 128], text_rows=641)
    for splits in (0, 1, 2):
        compare(replace(case, text_bits=text_bits), "few", splits)


def test_few_keeps_many_small_weights() -> None:
    """One token's weight is 65,535, those of 1,023 others are 0.45 each: rounded alike, 0.7 % would be lost."""
    case = Case(ratio=4, correction="none", counts=[[256] * 4], text=[0], group_size=256)
    tensors = make(case)
    slot = int(tensors["slot"][0])
    tensors["visual_key_params"][slot] = torch.tensor([1.0, 0.0, 0.0], device="cuda")[:, None]
    tensors["visual_key"][slot] = 0
    tensors["visual_key"][slot, :, 0, :, 0] = -1
    tensors["query"].fill_(11.88 / 128**0.5)
    tensors["key"].zero_()
    assert error(attend(tensors, case.attributes, "few", 1), reference(tensors, case.attributes)) < 1e-3


@pytest.mark.parametrize("slots", [1, 700])
def test_few_of_any_number_of_slots(slots: int) -> None:
    """The counts of all slots are read at once where they are few."""
    compare(Case(counts=[[256, 100]], text=[20], slots=slots, text_rows=30), "few")
    compare(Case(counts=[[], []] if slots > 1 else [[]], text=[20, 0], slots=slots, text_rows=30), "few")


@pytest.mark.parametrize("head_dim", [32, 96, 128, 160, 256])
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_plain(head_dim: int, correction: str) -> None:
    for i, dtype in enumerate(TOLERANCE):
        case = Case(BITS[i], BITS[3 - i], head_dim, 2, 3, (1, 3, 17)[i], correction, dtype)
        compare(case, "plain")


PADDING = [[], [0, 1, 2], [2, 63, 64, 150], list(range(40, 200))]


@pytest.mark.parametrize("head_dim", range(32, 257, 32))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_prefill(head_dim: int, dtype: torch.dtype, correction: str) -> None:
    for i, positions in enumerate((1, 63, 64, 200, 333)):
        bits = BITS[i % 4], BITS[(i + head_dim // 32) % 4]
        case = Case(*bits, head_dim, 2, (1, 4)[i % 2], positions, correction, dtype, padding=PADDING)
        compare(case, "prefill")


MASKS = (
    {"sliding_window": 3},
    {"sliding_window": 150},
    {"visual_mask": "run"},
    {"visual_mask": "run", "sliding_window": 40},
    {"visual_mask": "prefix"},
    {"visual_mask": "prefix", "sliding_window": 5},
    {"softcap": 2.0},
    {"softcap": 3.0, "visual_mask": "run", "sliding_window": 70},
)


@pytest.mark.parametrize("masks", MASKS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_masks_in_decode(head_dim: int, masks: dict[str, object]) -> None:
    for i, (ratio, positions) in enumerate(SHAPES):
        bits, dtype = BITS[i % 4], torch.bfloat16 if i % 3 == 0 else torch.float16
        pictures = [(1, 3), (4, 8)] if positions > 3 else []
        for splits in (0, 1, 3):
            case = Case(bits, BITS[(i + splits) % 4], head_dim, 2, ratio, positions, dtype=dtype, pictures=pictures)
            compare(replace(case, **masks), "codes", splits)


@pytest.mark.parametrize("masks", MASKS, ids=str)
@pytest.mark.parametrize("head_dim", [32, 128, 256, 512])
def test_masks_in_prefill(head_dim: int, masks: dict[str, object]) -> None:
    for i, positions in enumerate((1, 63, 200, 333)):
        pictures = [(5, 60), (61, 100), (130, 300)] if positions > 100 else []
        case = Case(BITS[i], BITS[i], head_dim, 2, (1, 4)[i % 2], positions, padding=PADDING, pictures=pictures)
        for dtype in (torch.float16, torch.bfloat16):
            for kernel in ("prefill", "plain"):
                compare(replace(case, dtype=dtype, **masks), kernel)
    compare(replace(case, softcap=2.0, correction="affine"), "prefill")


@pytest.mark.parametrize("masks", [{}, *MASKS], ids=str)
def test_masks_in_the_kernel_that_is_chosen(masks: dict[str, object]) -> None:
    """Any kernel gives the same; in FP32 it is the plain one."""
    for dtype, positions in ((torch.float32, 30), (torch.float16, 1), (torch.float16, 300)):
        for bits in (1, 2):
            compare(Case(bits, bits, positions=positions, dtype=dtype, pictures=[(3, 20)], **masks), "auto")


@pytest.mark.parametrize("kernel", ["codes", "plain", "prefill"])
def test_wide_heads(kernel: str) -> None:
    for head_dim in (512,) if kernel == "prefill" else (288, 512):
        for i, (key_bits, value_bits) in enumerate([(1, 1), (2, 8), (4, 4), (8, 1)]):
            positions = (1, 70, 130, 200)[i] if kernel == "prefill" else (1, 2, 3, 8)[i]
            for correction in CORRECTIONS:
                dtype = torch.bfloat16 if i % 2 else torch.float16
                case = Case(key_bits, value_bits, head_dim, 2, (1, 4)[i % 2], positions, correction, dtype)
                compare(case, kernel)


@pytest.mark.parametrize("kernel", ["codes", "prefill", "plain"])
def test_what_a_window_hides_changes_nothing(kernel: str) -> None:
    case = Case(ratio=2, sliding_window=9, correction="none", positions=70 if kernel == "prefill" else 1)
    tensors = make(case)
    tensors["window_start"][:, 0] = 300
    tensors["window_start"][:, 1] = 21
    output = attend(tensors, case.attributes, kernel)
    tensors["visual_key"][:, :, :2] = -1
    tensors["visual_value"][:, :, :2] = -1
    tensors["text_key"][:, :, :21] = 7e3
    tensors["text_value"][:, :, :21] = 7e3
    assert torch.equal(attend(tensors, case.attributes, kernel), output)


@pytest.mark.parametrize(("key_bits", "value_bits"), list(itertools.product(BITS, BITS)))
@pytest.mark.parametrize("head_dim", [96, 128, 256])
def test_prefill_over_cached_pictures(key_bits: int, value_bits: int, head_dim: int) -> None:
    counts = [[128] * 20, [128, 1, 64, 65, 127] * 3, [], [3]]
    for correction, ratio in zip(CORRECTIONS, (1, 7, 3), strict=True):
        case = Case(key_bits, value_bits, head_dim, 2, ratio, 130, correction, group_size=128, groups=24, counts=counts)
        compare(replace(case, padding=PADDING), "prefill")


def test_prefill_of_many_positions() -> None:
    case = Case(positions=2500, kv_heads=1, ratio=2, padding=PADDING)
    compare(case, "prefill")
    compare(replace(case, group_size=128, counts=[[], [], [], []], text=[0, 0, 0, 0]), "prefill")


def test_prefill_does_not_round_cached_values_to_bf16() -> None:
    """Two levels per channel: their rounding error is that of all tokens, 7e-3 of an output whose values cancel."""
    compare(Case(8, 1, 32, 2, 4, 200, dtype=torch.bfloat16), "prefill", tolerance=4e-3)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_prefill_of_levels_beyond_fp16(correction: str) -> None:
    """Levels round to infinity in FP16; infinity times the weight 0 of a masked token would be NaN."""
    case = Case(positions=70, correction=correction)
    tensors = make(case)
    tensors["visual_value_params"][:, :, :, 0] = 64.0
    tensors["visual_value_params"][:, :, :, 1] = 65472.0
    expected = reference(tensors, case.attributes).clamp(-65504, 65504)
    assert error(attend(tensors, case.attributes, "prefill"), expected) < 1e-3


@pytest.mark.parametrize("scale", [0.0, -0.1])
def test_scales_that_are_not_positive(scale: float) -> None:
    case = Case(positions=70, counts=[[200], [7], [], [5]])
    tensors, attributes = make(case), replace(case.attributes, scale=scale)
    assert error(attend(tensors, attributes), reference(tensors, attributes)) < 1e-3
    with pytest.raises(OptionError, match="kernel that was asked for"):
        attend(tensors, attributes, "prefill")


def test_affine_of_equal_and_of_close_scores() -> None:
    """All scores of the pictures equal: they stay. A range below tau: all become the least."""
    for factor in (0.0, 1e-3):
        case = Case(positions=70, correction="affine")
        tensors = make(case)
        tensors["visual_key_params"][:, :, :, 0] *= factor
        tensors["visual_key_params"][:, :, :, 1] = tensors["visual_key_params"][:, :, :1, 1]
        expected = reference(tensors, case.attributes)
        if not factor:
            expected = reference(tensors, replace(case, correction="none").attributes)
        assert error(attend(tensors, case.attributes, "prefill"), expected) < 1e-3


@pytest.mark.parametrize("kernel", ["codes", "planes", "few", "plain", "prefill"])
def test_idle_rows_are_zero(kernel: str) -> None:
    case = Case()
    tensors = make(case)
    tensors["slot"][1] = -1
    output = attend(tensors, case.attributes, kernel)
    assert not output[1].any()
    assert error(output, reference(tensors, case.attributes)) < 1e-3


@pytest.mark.parametrize("kernel", ["codes", "planes", "few", "plain", "prefill"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_sharp_scores(kernel: str, bits: int) -> None:
    case = Case(bits, bits, correction="none", ratio=3, positions=70 if kernel == "prefill" else 1)
    tensors = make(case)
    tensors["query"] = tensors["query"] * 6
    assert error(attend(tensors, case.attributes, kernel), reference(tensors, case.attributes)) < 5e-3


@pytest.mark.parametrize("kernel", ["codes", "planes", "few"])
def test_what_is_past_the_counts_changes_nothing(kernel: str) -> None:
    case = Case(ratio=2, correction="none")
    tensors = make(case)
    output = attend(tensors, case.attributes, kernel)
    for name, along_tokens in (("visual_key", False), ("visual_value", True)):
        for at, counts in enumerate(tensors["visual_count"].tolist()):
            valid = (
                torch.cat([torch.arange(case.group_size) < count for count in counts]).cuda().unflatten(0, (-1, 128))
            )
            if along_tokens:  # a bit of a word each
                bits = (valid.unflatten(1, (4, 32)) * (1 << torch.arange(32, device="cuda"))).sum(-1)
                keep = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)[None, :, None, None]
                words = tensors[name][at]
                tensors[name][at] = (words & keep) | (torch.randint_like(words, -(2**31), 2**31 - 1) & ~keep)
            else:
                words = tensors[name][at]
                other = torch.randint_like(words, -(2**31), 2**31 - 1)
                tensors[name][at] = torch.where(valid[None, :, None, :, None], words, other)
    assert torch.equal(attend(tensors, case.attributes, kernel), output)


@pytest.mark.parametrize("kernel", ["codes", "planes", "few"])
def test_parts_of_the_sequence_change_rounding_only(kernel: str) -> None:
    case = Case(ratio=2)
    tensors = make(case)
    whole = attend(tensors, case.attributes, kernel, 1)
    for splits in (2, 3, 7):
        assert error(attend(tensors, case.attributes, kernel, splits), whole.double()) < 6e-4


@pytest.mark.parametrize("kernel", ["codes", "planes", "few", "plain", "prefill"])
@pytest.mark.parametrize("text_bits", [16, 8])
def test_rows_do_not_depend_on_each_other(text_bits: int, kernel: str) -> None:
    corrections = ("none", "expected") if kernel in ("planes", "few") else CORRECTIONS
    for correction in corrections:
        positions = 200 if kernel == "prefill" else 1
        case = Case(ratio=2, positions=positions, correction=correction, padding=PADDING, text_bits=text_bits)
        tensors = make(case)
        together = attend(tensors, case.attributes, kernel, 2)
        call = ("query", "key", "value", "visual_index", "text_index", "slot")
        for row in range(4):
            alone = {name: x[row : row + 1] if name in call else x for name, x in tensors.items()}
            assert torch.equal(attend(alone, case.attributes, kernel, 2), together[row : row + 1])
        moved = {name: x if name in call else x.roll(1, 0) for name, x in tensors.items()}
        moved["slot"] = (moved["slot"] + 1) % case.slots
        assert torch.equal(attend(moved, case.attributes, kernel, 2), together)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 160, 256, 512])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_text_rows_of_8_bits(head_dim: int, dtype: torch.dtype) -> None:
    """All kernels; a capacity of an odd number of rows, so that few begin at multiples of more than 4 bytes."""
    case = Case(head_dim=head_dim, dtype=dtype, text_bits=8, text=[101, 0, 33, 16], text_rows=101, padding=PADDING)
    for i, (ratio, positions) in enumerate(SHAPES):
        for kernel in ("codes", "planes") if head_dim == 128 else ("codes",):
            compare(replace(case, ratio=ratio, positions=positions), kernel, (0, 1, 3)[i % 3])
        if head_dim == 128 and positions == 1:
            compare(replace(case, ratio=ratio), "few", i)
    for kernel, positions in (("prefill", 130), ("plain", 17)):
        if head_dim <= 256 or positions == 17 or head_dim == 512:
            compare(replace(case, ratio=2, positions=positions), kernel)
    if head_dim <= 256:
        for kernel, positions in (("codes", 3), ("prefill", 70)):
            compare(replace(case, positions=positions, sliding_window=20, softcap=5.0), kernel)


def test_text_rows_of_8_bits_in_float32() -> None:
    compare(Case(dtype=torch.float32, text_bits=8, positions=9), "auto")


def test_many_groups() -> None:
    counts = [[128] * 40, [128, 1] * 35, [], [3]]
    case = Case(group_size=128, groups=70, counts=counts, ratio=4)
    for kernel, splits in itertools.product(("codes", "planes", "few"), (1, 5)):
        compare(case, kernel, splits)


@pytest.mark.parametrize("positions", [1, 150])
def test_calls_in_a_captured_graph(positions: int) -> None:
    case = Case(positions=positions)
    tensors = make(case)
    expected = attend(tensors, case.attributes)
    inputs = [x.clone() for x in tensors.values()]
    visual_kv_attention_(*inputs, **case.attributes.to_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = visual_kv_attention_(*inputs, **case.attributes.to_dict())
    output.fill_(torch.nan)
    graph.replay()
    assert torch.equal(output, expected)


def test_a_kernel_that_does_not_fit_is_refused() -> None:
    case = Case(head_dim=96)
    with pytest.raises(OptionError, match="kernel that was asked for"):
        attend(make(case), case.attributes, "planes")
    with pytest.raises(OptionError, match="kernel that was asked for"):
        attend(
            make(replace(case, head_dim=128, correction="affine")),
            replace(case, correction="affine").attributes,
            "planes",
        )
    with pytest.raises(OptionError, match="kernel that was asked for"):
        attend(make(Case(positions=2)), Case(positions=2).attributes, "few")
