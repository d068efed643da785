"""Where manifest, graphs and tokenizer of a bundle disagree, it is refused in one line before anything runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fakes import manifest as fake_manifest
from families import CASES, Case

from vkvx import Session
from vkvx.cli import main
from vkvx.errors import BundleError, InputError
from vkvx.graph_files import read_graph
from vkvx.graph_specs import Graph, vision_outputs
from vkvx.manifest import FILE_NAME, FileInfo, Manifest, PictureInfo
from vkvx.models.pictures.kinds import check_pictures
from vkvx.models.presets import preset_config
from vkvx.models.registry import FAMILIES
from vkvx.runtime.bundles import load_manifest
from vkvx.runtime.sessions.processor import Processor

Change = Callable[[Any], object]


class Damaged:
    """A copy of a bundle whose files a test changes; ``restore`` makes it as it was."""

    def __init__(self, original: Path, directory: Path) -> None:
        self.directory = directory
        shutil.copytree(original, directory)
        self._kept: dict[Path, bytes] = {}

    def write(self, name: str, data: bytes) -> None:
        """A file with other contents, which the manifest knows."""
        path = self.directory / name
        self._kept.setdefault(path, path.read_bytes())
        path.write_bytes(data)
        if name != FILE_NAME:
            self.manifest(lambda found: found["files"][name].update(bytes=len(data), sha256=sha256_of(data)))

    def manifest(self, change: Change) -> None:
        """Another manifest."""
        data = json.loads((self.directory / FILE_NAME).read_bytes())
        change(data)
        self.write(FILE_NAME, json.dumps(data).encode())

    def graph(self, name: str, change: Change) -> None:
        """Another ONNX file."""
        model = onnx.load(self.directory / f"{name}.onnx", load_external_data=False)
        change(model)
        self.write(f"{name}.onnx", model.SerializeToString())

    def settings(self, name: str, change: Change) -> None:
        """Another JSON file of the processor."""
        data = json.loads((self.directory / "processor" / name).read_bytes())
        change(data)
        self.write(f"processor/{name}", json.dumps(data).encode())

    def restore(self) -> None:
        """Undo all of it."""
        for path, data in self._kept.items():
            path.write_bytes(data)
        self._kept.clear()


def sha256_of(data: bytes) -> str:
    from hashlib import sha256

    return sha256(data).hexdigest()


@pytest.fixture(scope="module")
def copied(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    return Damaged(tiny_bundle, tmp_path_factory.mktemp("damaged") / "bundle")


@pytest.fixture
def damaged(copied: Damaged) -> Iterator[Damaged]:
    yield copied
    copied.restore()


@pytest.fixture
def refused(damaged: Damaged, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a verb on the damaged bundle, which must be refused; returns the line."""

    def call(*arguments: str) -> str:
        verb, *others = arguments
        code = main([verb, str(damaged.directory), *others])
        captured = capfd.readouterr()
        assert (code, captured.out) == (2, ""), captured.err
        assert "unexpected" not in captured.err.partition("(")[0]
        (line,) = (one for one in captured.err.splitlines() if one.startswith("vkvx: error: "))
        return line

    return call


def tensor(name: str, graph: str = "decoder", side: str = "inputs") -> Callable[[Any], Any]:
    """An input or output in a manifest."""
    return lambda data: next(one for one in data["graphs"][graph][side] if one["name"] == name)


def swapped(data: Any) -> None:
    """Two inputs in each other's place."""
    inputs = data["graphs"]["decoder"]["inputs"]
    inputs[0], inputs[3] = inputs[3], inputs[0]


MANIFESTS: dict[str, tuple[Change, str]] = {
    "one token a picture": (lambda data: data["model"].update(tokens_per_picture=1), "tokens_per_picture 1 .* 576"),
    "as many everywhere": (
        lambda data: data["model"].update(
            tokens_per_picture=1,
            typical_tokens=[1],
            pictures={"kind": "tiles", "numbers": {"tile_tokens": 1}, "marks": {}},
        ),
        "graphs.vision.outputs and model.pictures differ: .*576",
    ),
    "typical tokens": (lambda data: data["model"].update(typical_tokens=[577]), "typical_tokens"),
    "negative image token": (lambda data: data["model"].update(image_token_id=-5), "image_token_id must be 0 to"),
    "image token past the vocabulary": (lambda data: data["model"].update(image_token_id=512), "less than vocab_size"),
    "end past the vocabulary": (lambda data: data["model"].update(eos_token_ids=[99999]), "eos_token_ids"),
    "huge vocabulary": (lambda data: data["model"].update(vocab_size=10**30), "vocab_size must be a number of at most"),
    "other vocabulary": (lambda data: data["model"].update(vocab_size=2**31 - 1), "graphs.decoder.outputs .*'logits'"),
    "renamed input": (lambda data: tensor("slot")(data).update(name="foo"), "'foo' stands where 'slot'"),
    "swapped inputs": (swapped, "'visual_index' stands where 'input_ids'"),
    "negative size": (lambda data: tensor("input_ids")(data).update(shape=["B", -1]), "must be 0 to 2147483647"),
    "huge size": (lambda data: tensor("past.0.text_key")(data).update(shape=[2**31]), "must be 0 to 2147483647"),
    "other size": (lambda data: tensor("past.0.text_key")(data)["shape"].__setitem__(3, 32), "past.0.text_key"),
    "no rank": (lambda data: tensor("slot")(data).update(shape=[]), "'slot' is int32 .*, expected int32"),
    "other symbol": (
        lambda data: tensor("slot")(data).update(shape=["S"]),
        "'slot' is int32 .*S.*, expected int32 .*B",
    ),
    "no symbol": (lambda data: tensor("slot")(data).update(shape=["-2*B"]), "a name such as P or 256"),
    "other type": (lambda data: tensor("slot")(data).update(dtype="float32"), "'slot' is float32"),
    "no type": (lambda data: tensor("slot")(data).update(dtype="bool"), "must be one of"),
    "fewer outputs": (lambda data: data["graphs"]["decoder"]["outputs"].pop(), "graphs.decoder.outputs .* expected"),
    "pixels of another name": (
        lambda data: tensor("pixel_values", "vision")(data).update(name="pixels"),
        "graphs.vision.inputs must begin with pixel_values",
    ),
    "pixels that are no squares": (
        lambda data: tensor("pixel_values", "vision")(data).update(shape=["P", 3, 336, 7]),
        "graphs.vision.inputs and model.pictures differ",
    ),
    "other width": (
        lambda data: data["model"].update(embed_width=2 * data["model"]["hidden_size"]),
        "graphs.decoder.inputs .*'visual_embeds'",
    ),
    "other kind": (lambda data: data["model"]["pictures"].update(kind="grid"), "model.pictures do not suit"),
    "one file for both": (
        lambda data: data["graphs"]["vision"].update(file="decoder.onnx"),
        "its inputs are not those",
    ),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_that_say_otherwise(name: str, damaged: Damaged, refused: Callable[..., str]) -> None:
    change, words = MANIFESTS[name]
    damaged.manifest(change)
    for verb in (("inspect",), ("run", "What?", "--no-verify")):
        assert re.search(words, refused(*verb))


def ends(name: str, side: str = "input") -> Callable[[Any], Any]:
    """An input or output of an ONNX model."""
    return lambda model: next(one for one in getattr(model.graph, side) if one.name == name)


def set_dim(name: str, axis: int, value: int | str, side: str = "input") -> Change:
    def change(model: Any) -> None:
        dim = ends(name, side)(model).type.tensor_type.shape.dim[axis]
        setattr(dim, "dim_value" if isinstance(value, int) else "dim_param", value)

    return change


def set_place(key: str, value: str) -> Change:
    def change(model: Any) -> None:
        weight = next(one for one in model.graph.initializer if one.external_data)
        next(entry for entry in weight.external_data if entry.key == key).value = value

    return change


def rename(name: str, other: str, side: str = "input") -> Change:
    return lambda model: setattr(ends(name, side)(model), "name", other)


def set_type(name: str, kind: int) -> Change:
    return lambda model: setattr(ends(name)(model).type.tensor_type, "elem_type", kind)


GRAPHS: dict[str, tuple[str, Change, str]] = {
    "renamed input": ("decoder", rename("slot", "foo"), "its inputs are not those of vkvx.json: 'foo' stands where"),
    "renamed output": ("vision", rename("image_embeds", "foo", "output"), "its outputs are not .* 'foo' stands where"),
    "complex": ("decoder", set_type("slot", 15), "'slot' is type 15"),
    "negative size": ("decoder", set_dim("slot", 0, -1), "'slot' is int32 .-1."),
    "huge size": ("decoder", set_dim("past.0.text_key", 3, 2**40), "past.0.text_key"),
    "other symbol": ("decoder", set_dim("slot", 0, "S"), "'slot' is int32"),
    "tokens of a tile": ("vision", set_dim("image_embeds", 0, "1*P", "output"), "image_embeds' is float16 .'1.P'"),
    "tokens without a size": ("vision", set_dim("image_embeds", 0, "", "output"), "image_embeds"),
    "no inputs": ("vision", lambda model: model.graph.ClearField("input"), "there are 0, expected 1"),
    "weights elsewhere": ("decoder", set_place("location", "../../../etc/passwd"), "no file of the bundle"),
    "absolute path": ("vision", set_place("location", "/etc/passwd"), "no file of the bundle"),
    "weights past the file": ("vision", set_place("offset", "9" * 30), "do not trust this bundle"),
    "negative offset": ("vision", set_place("offset", "-1"), "takes .* bytes, not"),
    "weights of another size": ("vision", set_place("length", "1"), "takes .* bytes, not 1 at"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_that_say_otherwise(name: str, damaged: Damaged, refused: Callable[..., str]) -> None:
    graph, change, words = GRAPHS[name]
    damaged.graph(graph, change)
    for verb in (("inspect", "--verify"), ("run", "What?")):
        assert re.search(words, refused(*verb))


@pytest.mark.parametrize("name", [b"slot", b"present.0.text_key", b"vkvx-metrics.safetensors", b"VisualKVAttention"])
def test_names_that_are_no_text(name: bytes, damaged: Damaged, refused: Callable[..., str]) -> None:
    data = (damaged.directory / "decoder.onnx").read_bytes()
    damaged.write("decoder.onnx", data.replace(name, b"\xff" * len(name)))
    for verb in (("inspect",), ("run", "What?")):
        assert re.search("no text|not a readable ONNX file", refused(*verb))


@pytest.mark.parametrize("cut", [0, 1, 1000])
def test_graphs_that_are_cut_off(cut: int, damaged: Damaged, refused: Callable[..., str]) -> None:
    damaged.write("decoder.onnx", (damaged.directory / "decoder.onnx").read_bytes()[:cut])
    assert "decoder.onnx" in refused("inspect")


PROCESSORS: dict[str, tuple[Change, str]] = {
    "image token of plain text": (
        lambda bundle: bundle.manifest(lambda data: data["model"].update(image_token_id=100)),
        "image token 100 is no added token",
    ),
    "a file by its path": (
        lambda bundle: bundle.settings("tokenizer_config.json", lambda data: data.update(gguf_file="../../x.gguf")),
        "names a file by 'gguf_file'",
    ),
    "no JSON": (lambda bundle: bundle.write("processor/tokenizer.json", b"{"), "cannot load the processor"),
    "no tokenizer": (lambda bundle: bundle.write("processor/tokenizer.json", b"[]"), "cannot load the processor"),
    "no image processor": (lambda bundle: bundle.write("processor/preprocessor_config.json", b"[]"), "cannot load"),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_that_say_otherwise(name: str, damaged: Damaged, refused: Callable[..., str]) -> None:
    change, words = PROCESSORS[name]
    change(damaged)
    assert re.search(words, refused("run", "What?"))


def test_another_tokenizer(damaged: Damaged) -> None:
    manifest = Manifest.load(damaged.directory)
    other = replace(manifest, model=replace(manifest.model, vocab_size=600, eos_token_ids=(510,)))
    with pytest.raises(BundleError, match=r"none of the tokens that end an answer, \[510\]"):
        Processor.of_bundle(damaged.directory, other)
    small = replace(manifest, model=replace(manifest.model, vocab_size=300))
    with pytest.raises(BundleError, match="the tokenizer has 406 tokens, the decoder 300"):
        Processor.of_bundle(damaged.directory, small)


def test_a_token_that_was_added_and_the_decoder_lacks(damaged: Damaged) -> None:
    def add(data: Any) -> None:
        data["added_tokens"].append({**data["added_tokens"][-1], "id": 600, "content": "<later>"})

    damaged.settings("tokenizer.json", add)
    processor = Processor.of_bundle(damaged.directory, Manifest.load(damaged.directory))
    assert processor.prepare("What?").token_ids.size
    with pytest.raises(InputError, match="the token '<later>', which the model does not know"):
        processor.prepare("What <later>?")


def test_a_tokenizer_that_fails_at_use(damaged: Damaged, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """What Rust code raises; no Exception."""

    def panic(*arguments: object, **options: object) -> None:
        raise PanicException("no entry found for key")

    processor = Processor.of_bundle(damaged.directory, Manifest.load(damaged.directory))
    monkeypatch.setattr(type(processor._tokenizer), "_encode_plus", panic)
    monkeypatch.setattr(type(processor._tokenizer), "decode", panic)
    for use in (lambda: processor.prepare("What?"), lambda: processor.decode([5])):
        with pytest.raises(BundleError, match=r"the tokenizer of the model fails \(no entry found for key\)"):
            use()


@pytest.mark.parametrize("size", [0, 1 << 30])
def test_sizes_of_pictures_that_no_model_has(size: int, damaged: Damaged, refused: Callable[..., str]) -> None:
    damaged.settings("preprocessor_config.json", lambda data: data["size"].update(shortest_edge=size))
    assert "the image processor's size has shortest_edge" in refused("run", "What?")


def test_files_beside_those_of_the_processor(damaged: Damaged, refused: Callable[..., str]) -> None:
    other = damaged.directory / "processor" / "added_tokens.json"
    other.write_text("{}")
    try:
        assert "is no file of the bundle; remove it" in refused("run", "What?")
    finally:
        other.unlink()


def test_links_that_leave_the_bundle(damaged: Damaged, refused: Callable[..., str], tmp_path: Path) -> None:
    path = damaged.directory / FILE_NAME
    text = path.read_bytes()
    try:
        path.unlink()
        (tmp_path / "outside").write_bytes(text)
        path.symlink_to(tmp_path / "outside")
        assert "is a link that leaves the directory" in refused("inspect")
    finally:
        path.unlink()
        path.write_bytes(text)


def test_what_the_first_format_left_open(damaged: Damaged) -> None:
    """Graphs of format 1 named the number of visual tokens without saying what it follows from."""
    damaged.graph("vision", set_dim("image_embeds", 0, "Np", "output"))
    read_graph(damaged.directory, load_manifest(damaged.directory), "vision")

    def older(data: Any) -> None:
        model = data["model"]
        layer = model["layers"][0]
        model |= {"layers": len(model["layers"]), "kv_heads": layer["kv_heads"], "head_dim": layer["head_dim"]}
        for name in ("prompt", "typical_tokens", "pictures", "position_rows", "embed_width"):
            del model[name]
        data["graphs"]["vision"]["outputs"][0]["shape"][0] = "Np"
        data["format_version"] = 1

    damaged.manifest(older)
    read_graph(damaged.directory, load_manifest(damaged.directory), "vision")
    damaged.manifest(lambda data: data["model"].update(tokens_per_picture=1))
    page = np.zeros((60, 80, 3), np.uint8)
    with (
        Session.load(damaged.directory, backend="onnxruntime") as session,
        pytest.raises(BundleError, match="makes 576 visual tokens of pictures that have 1"),
    ):
        session.generate("<image> What?", page, max_new_tokens=1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.preset)
def test_vision_graphs_of_all_families(case: Case) -> None:
    """The graph that an export makes suits the kind of pictures; with other numbers that it shows it does not."""
    config = preset_config(case.preset)
    family = FAMILIES[config.architectures[0]].variant(config)
    info, pixels = family.info(config, "float16"), family.pixel_inputs(config)
    vision = Graph("vision.onnx", 18, pixels, vision_outputs(info, family.pictures(config).rows))
    made = replace(fake_manifest(), model=info, graphs={"vision": vision, "decoder": vision})
    check_pictures(made)
    shown = {"tile_tokens", "tile_pixels", "merge", "window", "patch", "pool"} & {
        name for name, number in info.pictures.numbers.items() if number
    }
    assert shown
    for name in shown:
        numbers = {**info.pictures.numbers, name: info.pictures.numbers[name] + 1}
        other = replace(info, pictures=PictureInfo(info.pictures.kind, numbers, info.pictures.marks))
        with pytest.raises(BundleError):
            check_pictures(replace(made, model=other))
    for name in ("inputs", "outputs"):
        fewer = replace(vision, **{name: getattr(vision, name)[:-1]})
        with pytest.raises(BundleError, match=r"graphs\.vision"):
            check_pictures(replace(made, graphs={"vision": fewer}))


def test_graphs_that_are_far_too_large() -> None:
    made = fake_manifest()
    large = replace(made, files={**made.files, "vision.onnx": FileInfo(2**40, "0" * 64)})
    with pytest.raises(BundleError, match="larger than a graph"):
        read_graph(Path("nowhere"), large, "vision")
