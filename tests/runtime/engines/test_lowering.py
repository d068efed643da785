"""Each pass on a small graph: what it changes, that results stay, what it refuses. Then all of them on the decoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes import PassBase, PostconditionError

from vkvx.errors import BuildError
from vkvx.manifest import FileInfo, Manifest, sha256
from vkvx.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from vkvx.runtime.calls import Row, build_call
from vkvx.runtime.engines.dialect import Dialect
from vkvx.runtime.engines.lowering import LowerOpset, legalise
from vkvx.runtime.engines.lowering.branches import TakeBranch
from vkvx.runtime.engines.lowering.extents import StaticExtents
from vkvx.runtime.engines.lowering.frequencies import SplitFrequencies
from vkvx.runtime.engines.lowering.functions import InlineFunctions, StripFunctions
from vkvx.runtime.engines.lowering.names import UniqueNames
from vkvx.runtime.engines.lowering.shapes import PlainReshape, WholeShape
from vkvx.runtime.engines.lowering.slices import SliceAxes
from vkvx.runtime.engines.lowering.types import check_types
from vkvx.runtime.engines.lowering.vectors import ArgMaxOfMatrix
from vkvx.runtime.engines.lowering.words import SignedWords

RECENT = Dialect("10.9", opset=None, bfloat16=True, shape_and_reshape_attributes=True)
OLD = Dialect("8.6.0", opset=17, bfloat16=False, shape_and_reshape_attributes=False)

Feeds = dict[str, np.ndarray]


def graph(text: str, opset: int = 18, functions: str = "") -> ir.Model:
    """A model from ONNX's text form."""
    header = f'<ir_version: 10, opset_import: ["" : {opset}, "local" : 1]>\n'
    return ir.from_proto(onnx.parser.parse_model(header + text + functions))


def run(model: ir.Model, feeds: Feeds) -> list[np.ndarray]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def check(model: ir.Model, one: PassBase, feeds: Feeds) -> None:
    """Run a pass, which must change something, not the results, and nothing when it runs again."""
    before = run(model, feeds)
    assert one(model).modified
    onnx.checker.check_model(ir.to_proto(model))
    for expected, found in zip(before, run(model, feeds), strict=True):
        np.testing.assert_array_equal(expected, found)
    assert not one(model).modified


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph)]


CALL = "agraph (float[n] x) => (float[n] y) { y = local.Twice:a(x) }"
TWICE = '<domain: "local", overload: "a", opset_import: ["" : 18]>\nTwice (x) => (y) { y = Add(x, x) }'
X = {"x": np.array([3.0, -1.0, 2.0], np.float32)}


def test_functions_are_stripped() -> None:
    model = graph(CALL, functions=TWICE)
    assert model.functions
    assert StripFunctions()(model).modified
    (node,) = model.graph
    assert (node.domain, node.op_type, node.overload) == ("local", "Twice", "")
    assert not model.functions


def test_functions_are_inlined() -> None:
    model = graph(CALL, functions=TWICE)
    check(model, InlineFunctions(), X)
    assert operators(model) == ["Add"]
    assert set(model.opset_imports) == {""}


def test_a_node_without_a_function_cannot_be_inlined() -> None:
    with pytest.raises(PostconditionError, match="local"):
        InlineFunctions()(graph(CALL))


EXTENT = """agraph (int64[b] text_count, float[slots, heads, rows, d] text_key, int64[b, g] visual_count)
=> (int64 longest, int64 groups) {
  one = Constant <value_int = 1> ()
  most = ReduceMax <keepdims = 0> (text_count)
  longest = Max(most, one)
  zero = Constant <value = int64 {0}> ()
  filled = Greater(visual_count, zero)
  number = Cast <to = 7> (filled)
  axis = Constant <value_ints = [1]> ()
  used = ReduceSum <keepdims = 0> (number, axis)
  many = ReduceMax <keepdims = 0> (used)
  groups = Max(many, one)
}"""


def test_sizes_of_counts_become_capacities() -> None:
    model = graph(EXTENT)
    model.graph.inputs[1].name = "past.0.text_key"
    assert StaticExtents()(model).modified
    feeds = {
        "text_count": np.array([3, 5]),
        "past.0.text_key": np.zeros((2, 1, 9, 4), np.float32),
        "visual_count": np.array([[1, 0, 0, 0], [1, 1, 0, 0]]),
    }
    assert [int(value) for value in run(model, feeds)] == [9, 4]
    assert "ReduceMax" not in operators(model)


def test_other_maxima_stay() -> None:
    model = graph("agraph (float[n] x) => (float y) { y = ReduceMax <keepdims = 0> (x) }")
    assert not StaticExtents()(model).modified
    assert operators(model) == ["ReduceMax"]


BRANCH = """agraph (float[n, 2] x, float[n, 2] y) => (float[m, 2] z) {
  axis = Constant <value_int = 0> ()
  none = Constant <value_int = 0> ()
  shape = Shape(x)
  rows = Gather(shape, axis)
  some = Greater(rows, none)
  z = If (some) <
    then_branch = then () => (float[n, 2] a) { a = Add(x, y) },
    else_branch = other () => (float[n, 2] b) { b = Identity(y) }
  >
}"""


def test_the_branch_with_tokens_is_taken() -> None:
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    model = graph(BRANCH)
    check(model, TakeBranch(), {"x": rows, "y": rows})
    assert "If" not in operators(model)


def test_a_branch_on_data_is_refused() -> None:
    text = BRANCH.replace("Gather(shape, axis)", "Size(y)").replace("Greater(rows, none)", "Less(rows, none)")
    with pytest.raises(PostconditionError, match="data"):
        TakeBranch()(graph(text))


WORDS = """agraph (int32[n] words) => (int32[n, 4] bytes) {
  unsigned = Cast <to = 12> (words)
  axes = Constant <value_ints = [-1]> ()
  apart = Unsqueeze(unsigned, axes)
  shifts = Constant <value = uint32[4] {1, 256, 65536, 16777216}> ()
  shifted = Div(apart, shifts)
  low = Cast <to = 2> (shifted)
  bytes = Cast <to = 6> (low)
}"""


def test_words_are_split_without_unsigned_integers() -> None:
    edges = np.array([0, 1, -1, 255, 256, 2**31 - 1, -(2**31), -(2**31) + 1, -256, -257], np.int64)
    random = np.random.default_rng(3).integers(-(2**31), 2**31, 4096)
    words = np.concatenate([edges, random]).astype(np.int32)
    model = graph(WORDS)
    check(model, SignedWords(), {"words": words})
    np.testing.assert_array_equal(run(model, {"words": words})[0], words.view(np.uint8).reshape(-1, 4))


def test_bool_goes_to_float_directly() -> None:
    model = graph("agraph (bool[n] x) => (float[n] y) { small = Cast <to = 2> (x)\n y = Cast <to = 1> (small) }")
    check(model, SignedWords(), {"x": np.array([True, False])})
    assert operators(model) == ["Cast"]


def test_unsigned_integers_elsewhere_are_refused() -> None:
    with pytest.raises(PostconditionError, match="unsigned"):
        SignedWords()(graph("agraph (float[n] x) => (uint8[n] y) { y = Cast <to = 2> (x) }"))


def test_slices_get_axes() -> None:
    text = """agraph (float[n] x) => (float[m] y) {
      starts = Constant <value_ints = [0]> ()
      ends = Constant <value_ints = [-1]> ()
      y = Slice(x, starts, ends)
    }"""
    model = graph(text)
    check(model, SliceAxes(), X)
    (node,) = (node for node in model.graph if node.op_type == "Slice")
    assert ir.convenience.get_const_tensor(node.inputs[3]).numpy().tolist() == [0]


def test_a_slice_of_unknown_axes_is_refused() -> None:
    with pytest.raises(PostconditionError, match="axes"):
        SliceAxes()(graph("agraph (float[n] x, int64[k] s, int64[k] e) => (float[m] y) { y = Slice(x, s, e) }"))


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("shape", ["n", "n, 3"])
def test_argmax_of_a_vector(keepdims: int, shape: str) -> None:
    rank = 1 + shape.count(",")
    sizes = ", ".join(["k"] * (rank if keepdims else rank - 1))
    result = f"int64[{sizes}]" if sizes else "int64"
    model = graph(f"agraph (float[{shape}] x) => ({result} y) {{ y = ArgMax <axis = 0, keepdims = {keepdims}> (x) }}")
    x = np.random.default_rng(0).normal(size=(5, 3) if rank == 2 else 5).astype(np.float32)
    check(model, ArgMaxOfMatrix(), {"x": x})


def test_frequencies_lose_nothing_in_fp16() -> None:
    """Angles up to position 4,095 keep 22 bits when TensorRT stores constants in FP16."""
    frequencies = (10000.0 ** -(np.arange(32) / 32)).astype(np.float32)
    text = f"""agraph (float[n, 1] p) => (float[n, 64] c, float[n, 32] s, float[n, 1] q)
      <float[32] f = {{{", ".join(map(repr, frequencies.tolist()))}}}, float[1] h = {{0.1}}> {{
      a = Mul(p, f)
      b = Concat <axis = -1> (a, a)
      c = Cos(b)
      s = Sin(a)
      q = Mul(p, h)
    }}"""
    model, feeds = graph(text), {"p": np.arange(4096, dtype=np.float32)[:, None]}
    angles = feeds["p"].astype(np.float64) * frequencies
    one = SplitFrequencies()
    assert one(model).modified
    onnx.checker.check_model(ir.to_proto(model))
    assert not one(model).modified
    for node in model.graph:
        if node.op_type == "Constant":
            values = node.attributes["value"].as_tensor().numpy()
            assert np.array_equal(values, values.astype(np.float16))
    cosines, sines, other = run(model, feeds)
    np.testing.assert_allclose(cosines[:, 32:], np.cos(angles), atol=1e-3)
    np.testing.assert_allclose(sines, np.sin(angles), atol=1e-3)
    np.testing.assert_array_equal(other, feeds["p"] * np.float32(0.1))
    rounded = np.cos(feeds["p"] * frequencies.astype(np.float16).astype(np.float64))
    assert np.abs(rounded - np.cos(angles)).max() > 0.5  # what the pass is for


def test_names_of_copied_loops_are_apart() -> None:
    body = """<body = step (float state, float item) => (float next, float out) {{
      next = Add(state, item)
      out = Identity(next)
    }}, num_scan_inputs = 1>"""
    text = f"""agraph (float s, float[n] x) => (float a, float[n] b, float c, float[n] d) {{
      a, b = Scan {body.format()} (s, x)
      c, d = Scan {body.format()} (s, x)
    }}"""
    model = graph(text)
    check(model, UniqueNames(), {**X, "s": np.array(1, np.float32)})
    assert [value.name for value in model.graph.outputs] == ["a", "b", "c", "d"]
    assert {node.name for node in model.graph} == {"Scan", "Scan.2"}


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [("start = 1, end = 2", [3]), ("start = -2", [3, 5]), ("end = -1", [2, 3]), ("start = 1", [3, 5])],
)
def test_parts_of_shapes_are_gathered(attributes: str, expected: list[int]) -> None:
    model = graph(f"agraph (float[a, b, c] x) => (int64[k] y) {{ y = Shape <{attributes}> (x) }}")
    feeds = {"x": np.zeros((2, 3, 5), np.float32)}
    check(model, WholeShape(), feeds)
    assert run(model, feeds)[0].tolist() == expected
    assert operators(model) == ["Shape", "Constant", "Gather"]


def test_the_end_of_a_shape_of_unknown_rank_is_refused() -> None:
    model = graph("agraph (float[a, b] x) => (int64[k] y) { y = Shape <start = -1> (x) }")
    model.graph.inputs[0].shape = None
    with pytest.raises(PostconditionError, match="unknown rank"):
        WholeShape()(model)


def test_reshape_to_sizes_needs_no_allowzero() -> None:
    model = graph("""agraph (float[a, b] x) => (float[a, b, k] y) {
      shape = Shape(x)
      last = Constant <value_ints = [-1]> ()
      target = Concat <axis = 0> (shape, last)
      y = Reshape <allowzero = 1> (x, target)
    }""")
    check(model, PlainReshape(), {"x": np.ones((2, 3), np.float32)})


@pytest.mark.parametrize("target", ["Constant <value_ints = [0, 4]> ()", "Concat <axis = 0> (zero, four)"])
def test_reshape_to_nothing_is_refused(target: str) -> None:
    text = f"""agraph (float[a, b] x) => (float[c, d] y) {{
      zero = Constant <value_ints = [0]> ()
      four = Constant <value_ints = [4]> ()
      target = {target}
      y = Reshape <allowzero = 1> (x, target)
    }}"""
    with pytest.raises(PostconditionError, match="constant 0"):
        PlainReshape()(graph(text))


def test_the_opset_is_lowered_inside_loops_too() -> None:
    text = """agraph (float s, float[n, 2] x) => (float a, float[n] b) {
      a, b = Scan <body = step (float state, float[2] item) => (float next, float out) {
        axes = Constant <value_ints = [0]> ()
        out = ReduceMean <keepdims = 0> (item, axes)
        next = Add(state, out)
      }, num_scan_inputs = 1> (s, x)
    }"""
    model = graph(text)
    check(model, LowerOpset(17), {"s": np.array(0, np.float32), "x": np.arange(6, dtype=np.float32).reshape(3, 2)})
    (mean,) = (node for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.op_type == "ReduceMean")
    assert list(mean.attributes["axes"].as_ints()) == [0]


def test_an_opset_that_cannot_be_reached() -> None:
    with pytest.raises(PostconditionError, match="newer than 16"):
        LowerOpset(16)(graph(CALL, functions=TWICE))


def test_types() -> None:
    check_types(graph("agraph (bfloat16[n] x) => (int32[n] y) { y = Cast <to = 6> (x) }"), bfloat16=True, version="10")
    with pytest.raises(BuildError, match="--dtype float16"):
        check_types(
            graph("agraph (bfloat16[n] x) => (int32[n] y) { y = Cast <to = 6> (x) }"), bfloat16=False, version="8"
        )
    with pytest.raises(BuildError, match="INT64"):
        check_types(graph("agraph (int64[n] x) => (int32[n] y) { y = Cast <to = 6> (x) }"), bfloat16=True, version="10")


def test_what_is_no_graph(tmp_path: Path) -> None:
    path = tmp_path / "decoder.onnx"
    path.write_bytes(b"no protobuf")
    with pytest.raises(BuildError, match="not a readable ONNX file"):
        legalise(path, RECENT, plugin_free=False)


@pytest.mark.parametrize("dialect", [RECENT, OLD], ids=["recent", "8.6"])
def test_the_decoder_for_the_plugin(tiny_bundle: Path, dialect: Dialect) -> None:
    model = onnx.load_from_string(legalise(tiny_bundle / "decoder.onnx", dialect, plugin_free=False))
    nodes = [node for node in model.graph.node if node.domain]
    assert len(nodes) == len(Manifest.load(tiny_bundle).model.layers)
    assert not model.functions
    assert not any(node.overload for node in nodes)
    assert len(model.SerializeToString()) < 3 << 20
    external = [tensor for tensor in model.graph.initializer if tensor.external_data]
    assert {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"} == {
        "model.safetensors",
        "vkvx-metrics.safetensors",
    }
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    assert opset == (17 if dialect is OLD else 18)
    told = [attribute.s for node in nodes for attribute in node.attribute if attribute.name == "model_dtype"]
    assert told == ([b"float16"] * len(nodes) if dialect is OLD else [])
    if dialect is OLD:
        for node in model.graph.node:
            names = {attribute.name for attribute in node.attribute}
            assert not names & {"start", "end", "allowzero"}, node.op_type
            assert node.op_type != "ReduceMean" or len(node.input) == 1


def legalised_bundle(bundle: Path, target: Path, dialect: Dialect) -> Path:
    """A copy of a bundle whose decoder is the one that TensorRT would get without a plugin."""
    shutil.copytree(bundle, target)
    decoder = target / "decoder.onnx"
    decoder.write_bytes(legalise(bundle / "decoder.onnx", dialect, plugin_free=True))
    manifest = Manifest.load(bundle)
    files = {**manifest.files, "decoder.onnx": FileInfo(decoder.stat().st_size, sha256(decoder))}
    replace(manifest, files=files).save(target)
    return target


def logits_of_a_conversation(bundle: Path) -> list[np.ndarray]:
    """Logits of a prefill of two rows, one with a picture, of decode steps, and of a second turn with a picture."""
    manifest = Manifest.load(bundle)
    backend = OnnxRuntimeBackend(
        bundle, manifest, slots=2, visual_tokens=1280, text_tokens=200, provider="cpu", threads=1
    )
    backend._fills_empty = True  # as an engine without a plugin needs it
    rng = np.random.default_rng(5)
    picture = manifest.model.tokens_per_picture or 0
    image = np.full(picture, manifest.model.image_token_id, np.int32)
    size, hidden = manifest.quantization.group_size, manifest.model.hidden_size
    found, positions = [], [0, 0]
    for with_picture in (True, False, False, True):
        rows = []
        for slot in range(2):
            text = rng.integers(5, manifest.model.vocab_size, 5 if with_picture else 1).astype(np.int32)
            has = with_picture and slot == 0
            ids = np.concatenate([text, image]) if has else text
            rows.append(Row(slot, ids, (picture,) if has else (), positions[slot]))
            positions[slot] += len(ids)
        call = build_call(rows, group_size=size, image_token_id=manifest.model.image_token_id)
        shape = (*call.visual_index.shape, hidden)
        embeds = rng.normal(size=shape).astype(np.float32) if with_picture else None
        found.append(backend.step(call, embeds))
    return found


CASES = [
    ({"bits": 1, "dtype": "float32"}, OLD),
    ({"bits": 2, "quantizer": "quantile", "score_correction": "affine", "text_bits": 8}, RECENT),
    ({"bits": 16}, OLD),
]


@pytest.mark.parametrize(("options", "dialect"), CASES, ids=["shaped", "quantile", "16"])
def test_the_decoder_without_a_plugin_is_the_decoder(
    bundle_factory: Callable[..., Path], tmp_path: Path, options: dict[str, object], dialect: Dialect
) -> None:
    bundle = bundle_factory(**options)
    other = legalised_bundle(bundle, tmp_path / "legalised", dialect)
    assert "VisualKVAttention" not in (other / "decoder.onnx").read_bytes().decode("latin1")
    assert json.loads((other / "vkvx.json").read_text())["model"]["name"] == "tiny-llava"
    for expected, found in zip(logits_of_a_conversation(bundle), logits_of_a_conversation(other), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3 * np.abs(expected).max())
