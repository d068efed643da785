"""The TensorRT plugins on a GPU: made by the registry's creator, run on device buffers, equal to torch bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from operator_cases import CACHES, MASKS, METRIC_INPUTS, Arrays, Dims, attributes_for, empty_state, new_call
from oracle import Attributes
from plugin_calls import Builds, Creator, Desc, Node
from torch import Tensor
from torch_calls import arguments, in_order, same_bits, tensors

from vkvx.plugins import torch_cuda
from vkvx.plugins.library import CORRECTIONS, Params
from vkvx.plugins.operator import OUTPUTS, OperatorAttributes

pytestmark = [pytest.mark.gpu, pytest.mark.kernels]

# A prefill with pictures, decode steps, a later turn with a picture beside an idle row, a decode with a padding group.
CALLS = (
    ([(2, "t4 p300 t3"), (0, "t3 p128 t20 p90 t5"), (1, "t9")], {"spare": 3}),
    ([(2, "t1"), (0, "t1"), (1, "t1")], {}),
    ([(0, "t1"), (1, "t1")], {}),
    ([(1, "t2 p200 t4"), (-1, "t1"), (0, "t5")], {}),
    ([(0, "t1"), (-1, ""), (1, "t1")], {"empty_groups": 1}),
)
GUARD = 4096
POISON = 0xA5


class Layer:
    """One node of an engine: a plugin object that went through a plan, and its workspace for the largest call."""

    def __init__(
        self, creator: Creator, attributes: OperatorAttributes, most: dict[str, Tensor], in_place: bool
    ) -> None:
        built = creator.create(attributes.to_dict())
        assert built is not None, creator.messages()
        size = built.workspace(*describe(most, attributes))
        assert size > 0, creator.messages()
        self.node: Node = built.through_engine()
        self.creator, self.attributes, self.in_place = creator, attributes, in_place
        self.workspace = torch.empty(size + GUARD, dtype=torch.uint8, device="cuda")

    def __call__(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """Output and caches; where in place, the caches are those of the call, else of their own."""
        results = {"output": torch.full_like(named["query"], torch.nan)}
        for name in CACHES:
            results[name] = named[name] if self.in_place else torch.full_like(named[name], 99)
        before = {name: x.clone() for name, x in named.items()}
        self.workspace.fill_(POISON)
        self.enqueue(named, results)
        torch.cuda.synchronize()
        assert (self.workspace[-GUARD:] == POISON).all(), "written past the workspace"
        for name, x in named.items():
            assert same_bits(x, before[name]) or (self.in_place and name in CACHES), f"{name} was written to"
        return results

    def enqueue(self, named: dict[str, Tensor], results: dict[str, Tensor]) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        addresses = [named[definition.name].data_ptr() for definition in self.attributes.inputs]
        targets = [results[definition.name].data_ptr() for definition in OUTPUTS]
        descs = describe(named, self.attributes)
        code = self.node.enqueue(*descs, addresses, targets, self.workspace.data_ptr(), stream)
        assert code == 0, self.creator.messages()


def describe(named: dict[str, Tensor], attributes: OperatorAttributes) -> tuple[list[Desc], list[Desc]]:
    def desc(name: str) -> Desc:
        return Desc.of(named[name].shape, str(named[name].dtype).removeprefix("torch."))

    inputs = [desc(definition.name) for definition in attributes.inputs]
    return inputs, [desc("query"), *(desc(name) for name in CACHES)]


def on_gpu(inputs: Arrays, dims: Dims) -> dict[str, Tensor]:
    return {name: x.cuda() for name, x in tensors(inputs, dims.float_type).items()}


def torch_op(named: dict[str, Tensor], attributes: Attributes) -> dict[str, Tensor]:
    """What the torch binding makes of copies."""
    copies = {name: x.clone() for name, x in named.items()}
    output = torch.ops.vkvx.visual_kv_attention_(*in_order(copies), **arguments(attributes))
    return {"output": output} | {name: copies[name] for name in CACHES}


def operator_attributes(attributes: Attributes) -> OperatorAttributes:
    return OperatorAttributes(**arguments(attributes))  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["v3 registry", "v3", "v2", "v2 with copies"])
def way(request: pytest.FixtureRequest, plugin_builds: Builds) -> tuple[Creator, bool]:
    """A creator, and whether outputs share the memory of inputs."""
    name = request.param
    creator = Creator(plugin_builds, int(name[1]), registry="registry" in name)
    return creator, "copies" not in name


@pytest.mark.parametrize("float_type", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_equal_to_torch(way: tuple[Creator, bool], bits: int, float_type: str, head_dim: int) -> None:
    quantizer = ("shaped", "lloyd", "quantile", "shrink")[(bits + head_dim // 64) % 4 if bits > 1 else 0]
    correction = ("expected", "none", "affine")[(bits // 2 + head_dim // 128) % 3]
    attributes = attributes_for(bits, bits, quantizer=quantizer, score_correction=correction, scale=head_dim**-0.5)
    converse(way, attributes, Dims(8, 4, 2, head_dim, text_rows=1000, groups=6, float_type=float_type))


@pytest.mark.parametrize("more", MASKS, ids=str)
@pytest.mark.parametrize("quantizer", ["shaped", "lloyd"])
def test_equal_to_torch_with_masks(way: tuple[Creator, bool], quantizer: str, more: dict[str, object]) -> None:
    attributes = attributes_for(1, 1, quantizer=quantizer, scale=64**-0.5, **more)
    converse(way, attributes, Dims(8, 4, 2, 64, text_rows=1000, groups=6, float_type="float16"))


@pytest.mark.parametrize("bits", [1, 4])
def test_equal_to_torch_where_decode_is_done_in_parts(way: tuple[Creator, bool], bits: int) -> None:
    """Many tiles for few rows: the parts meet in the workspace, whose counters have to be zero."""
    attributes = attributes_for(bits, bits, quantizer="shaped", scale=128**-0.5)
    dims = Dims(3, 8, 8, 128, groups=40, text_rows=1500, float_type="float16")
    converse(way, attributes, dims, counts=(30 * 128, 900))


def converse(
    way: tuple[Creator, bool], attributes: Attributes, dims: Dims, counts: tuple[int, int] = (0, 0), seed: int = 3
) -> None:
    """The calls of a conversation, each compared; ``counts`` are visual and text tokens that slots start with."""
    rng = np.random.default_rng(seed)
    state = filled_state(dims, attributes, rng, *counts)
    creator, in_place = way
    layer = None
    for rows, padding in CALLS:
        named = on_gpu(new_call(rows, state, dims, attributes, rng, **padding), dims)  # type: ignore[arg-type]
        layer = layer or Layer(creator, operator_attributes(attributes), named, in_place)
        assert torch_cuda.takes(named, operator_attributes(attributes))
        expected = torch_op(named, attributes)
        results = layer(named)
        for name, x in expected.items():
            assert same_bits(results[name], x), name
        assert expected["output"].isfinite().all()
        state = next_state(state, {name: results[name] for name in CACHES}, named, attributes, dims)


def filled_state(dims: Dims, attributes: Attributes, rng: np.random.Generator, visual: int, text: int) -> Arrays:
    """Slots that hold this many tokens of random codes and rows."""
    state = empty_state(dims, attributes, rng)
    groups = visual // attributes.group_size
    state["visual_count"][:, :groups] = attributes.group_size
    state["text_count"][:] = text
    for name in ("visual_key_params", "visual_value_params"):
        shape = state[name][:, :, :groups].shape
        state[name][:, :, :groups] = rng.uniform(0.1, 0.5, shape).astype(np.float16)
    for name in ("text_key", "text_value"):
        rows = state[name][:, :, :text]
        rows[:] = rng.standard_normal(rows.shape).astype(rows.dtype)
    return state


def next_state(
    state: Arrays, caches: dict[str, Tensor], named: dict[str, Tensor], attributes: Attributes, dims: Dims
) -> Arrays:
    """Caches and counts after a call, as the runtime counts them."""
    after = {name: (x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy() for name, x in caches.items()}
    visual_count, text_count = state["visual_count"].copy(), state["text_count"].copy()
    for row, slot in enumerate(named["slot"].tolist()):
        if slot < 0:
            continue
        visual = (named["visual_index"][row] >= 0).cpu().numpy()
        text = int((named["text_index"][row] >= 0).sum())
        if attributes.key_bits == 16:
            text_count[slot] += text + int(visual.sum())
            continue
        text_count[slot] += text
        first = int((visual_count[slot] > 0).sum())
        for i, group in enumerate(visual.reshape(-1, attributes.group_size)):
            if group.any():
                visual_count[slot, first + i] = group.sum()
    return after | {"visual_count": visual_count, "text_count": text_count}


def test_in_a_captured_graph(way: tuple[Creator, bool]) -> None:
    """A replayed decode step gives what the first run gave, with another layer's bytes in the workspace."""
    attributes = attributes_for(1, 1, scale=128**-0.5)
    dims = Dims(3, 8, 8, 128, groups=40, text_rows=1500, float_type="float16")
    rng = np.random.default_rng(4)
    state = filled_state(dims, attributes, rng, 30 * 128, 900)
    named = on_gpu(new_call([(2, "t1"), (0, "t1")], state, dims, attributes, rng), dims)
    expected = torch_op(named, attributes)
    creator, in_place = way
    layer = Layer(creator, operator_attributes(attributes), named, in_place)
    results = layer(named)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.enqueue(named, results)
    for _ in range(3):
        results["output"].fill_(torch.nan)
        layer.workspace.fill_(POISON)
        graph.replay()
        torch.cuda.synchronize()
        for name, x in expected.items():
            assert same_bits(results[name], x), name


def test_more_workspace_than_the_engine_reserves(way: tuple[Creator, bool]) -> None:
    """An engine of a plugin that needed less, or a call beyond its profile: refused, nothing is written."""
    attributes = attributes_for(1, 1)
    dims = Dims(3, 1, 1, 32, text_rows=400, float_type="float16")
    rng = np.random.default_rng(5)
    state = empty_state(dims, attributes, rng)
    small = on_gpu(new_call([(2, "t1")], state, dims, attributes, rng), dims)
    large = on_gpu(new_call([(0, "t300"), (1, "t200"), (2, "t9")], state, dims, attributes, rng), dims)
    creator, in_place = way
    layer = Layer(creator, operator_attributes(attributes), small, in_place)
    layer(small)
    many = {name: torch.cat([x] * 300) if name not in (*CACHES, *METRIC_INPUTS, "visual_count", "text_count") else x
            for name, x in large.items()}  # fmt: skip
    many["slot"] = torch.full_like(many["slot"], -1)
    with pytest.raises(AssertionError, match=r"the workspace has \d+ bytes; this call needs \d+"):
        layer(many)


def test_workspaces_are_within_the_bound() -> None:
    """On this device no call needs more than the bound of the largest one."""
    library = torch_cuda.kernels()
    assert library is not None
    rng = np.random.default_rng(6)
    for _ in range(300):
        heads, bits = int(rng.integers(1, 33)), int(rng.choice([1, 2, 4, 8, 16]))
        correction = rng.choice(["none", "expected", "affine"])
        attributes = attributes_for(bits, bits, score_correction=str(correction))
        most = {"rows": int(rng.integers(1, 200)), "positions": int(rng.choice([1, 4, 8, 900]))}
        dims = {
            "query_heads": heads * int(rng.integers(1, 9)),
            "kv_heads": heads,
            "head_dim": int(rng.choice([64, 128, 256])),
        }
        groups = 0 if bits == 16 else int(rng.integers(0, 60))
        params = Params(
            dtype=int(rng.integers(0, 3)), slots=most["rows"], group_size=128, visual_capacity=128 * groups,
            text_capacity=int(rng.integers(1, 3000)), key_bits=bits, value_bits=bits, quantizer=3,
            correction=CORRECTIONS[attributes.score_correction], tau=3.0, correction_limit=3.0, scale=1.0,
            text_bits=16, **most, **dims,
        )  # fmt: skip
        bound = library.workspace_bound(params)
        for rows in {1, 2, most["rows"] // 2 + 1, most["rows"]}:
            for positions in {1, most["positions"] // 2 + 1, most["positions"]}:
                params.rows, params.positions = min(rows, most["rows"]), positions
                assert library.workspace_bytes(params) <= bound, (rows, positions, most, dims)
                assert library.workspace_zeroed(params) <= library.workspace_bytes(params)
