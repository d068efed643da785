"""Reading checkpoints: headers that promise more than the file holds, names, ties, and conversion of dtypes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CASES
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vkvx.errors import ModelError, StorageError
from vkvx.export import weights
from vkvx.export.build import build_model
from vkvx.export.weights import WeightPlan, load_tensor, match_parameters, place_weights, plan_weights
from vkvx.models.checkpoint import INDEX_FILE, SINGLE_FILE, StoredTensor, read_checkpoint
from vkvx.models.presets import preset_config
from vkvx.models.random_checkpoint import main, write_checkpoint
from vkvx.models.registry import resolve


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to spoil."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def test_every_tensor_is_where_the_safetensors_library_finds_it(checkpoint: Path) -> None:
    stored = read_checkpoint(checkpoint)
    files = sorted(checkpoint.glob("*.safetensors"))
    assert len(files) == 3
    found = 0
    for file in files:
        data = file.read_bytes()
        with safe_open(file, "pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (no dict)
                expected = reader.get_tensor(name)
                tensor = stored[name]
                assert (tensor.file.name, tensor.dtype, tensor.shape) == (file.name, "F32", tuple(expected.shape))
                assert data[tensor.offset : tensor.offset + tensor.length] == expected.numpy().tobytes()
                found += 1
    assert found == len(stored)


def test_one_file_without_an_index(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / SINGLE_FILE)
    stored = read_checkpoint(tmp_path)
    assert (stored["a"].shape, stored["b"].dtype) == ((2, 3), "BF16")


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def shard(copy: Path) -> Path:
    return copy / "model-00002-of-00003.safetensors"


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated(copy: Path, keep: int) -> None:
    path = shard(copy)
    truncate(path, keep if keep >= 0 else path.stat().st_size + keep)
    with pytest.raises(ModelError, match=r"model-00002-of-00003\.safetensors .*truncated") as caught:
        read_checkpoint(copy)
    assert "\n" not in str(caught.value)


def test_longer_than_its_header_says(copy: Path) -> None:
    with shard(copy).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ModelError, match="damaged"):
        read_checkpoint(copy)


def first(header: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in header.items() if name != "__metadata__")


@pytest.mark.parametrize(
    "change",
    [
        lambda header: first(header).update(dtype="F17"),
        lambda header: first(header).update(shape=[1, 2, 3]),
        lambda header: first(header).update(data_offsets=[4, 8]),
        lambda header: first(header).update(data_offsets=[-8, first(header)["data_offsets"][1] - 8]),
        lambda header: first(header).pop("shape"),
        lambda header: header.update(x=[]),
    ],
)
def test_damaged_header(copy: Path, change: Callable[[dict[str, Any]], None]) -> None:
    rewrite_header(shard(copy), change)
    with pytest.raises(ModelError, match="damaged header"):
        read_checkpoint(copy)


def test_header_that_is_no_json(copy: Path) -> None:
    with shard(copy).open("r+b") as file:
        file.seek(8)
        file.write(b"\xff\xfe{")
    with pytest.raises(ModelError, match="damaged header"):
        read_checkpoint(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("weight_map"), "cannot read"),
        (lambda index: index["weight_map"].update(x="../model.safetensors"), "outside its directory"),
        (lambda index: index["weight_map"].update(x="model-00004-of-00003.safetensors"), "is missing"),
        (lambda index: index["weight_map"].update(x="model-00001-of-00003.safetensors"), "lacks the tensor x"),
        (lambda index: index["weight_map"].update(x=3), "cannot read"),
    ],
)
def test_damaged_index(copy: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    index = json.loads((copy / INDEX_FILE).read_text())
    change(index)
    (copy / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        read_checkpoint(copy)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        read_checkpoint(tmp_path)


def fake_model(directory: Path) -> Any:
    source = resolve(directory)
    return build_model(source.family.model_class(), source.config, "float32")


@pytest.mark.parametrize("naming", ["hub", "transformers", "saved"])
def test_names_of_all_times_are_understood(checkpoint: Path, naming: str, tmp_path: Path) -> None:
    model = fake_model(checkpoint)
    stored = read_checkpoint(checkpoint)
    if naming == "transformers":
        renamed = {}
        for name, tensor in stored.items():
            new = name.replace("language_model.lm_head", "lm_head").replace(
                "language_model.model", "model.language_model"
            )
            new = new.replace("vision_tower.vision_model", "model.vision_tower")
            renamed[new.replace("multi_modal_projector", "model.multi_modal_projector")] = tensor
        assert set(renamed) == set(dict(model.named_parameters()))
        stored = renamed
    elif naming == "saved":
        resolve(checkpoint).family.model_class().from_pretrained(checkpoint).save_pretrained(tmp_path)
        stored = read_checkpoint(tmp_path)
    found = match_parameters(model, stored)
    for name, parameter in model.named_parameters():
        assert tuple(parameter.shape) == found[id(parameter)].shape
        assert name.rpartition(".")[0].split(".")[-1] in found[id(parameter)].name
    assert len({tensor.name for tensor in found.values()}) == len(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored, name: stored.pop(name), "lacks the tensor model.language_model.layers.0.mlp.up_proj.weight"),
        (lambda stored, name: stored.update({name: with_(stored[name], shape=(1, 2))}), "different models"),
        (lambda stored, name: stored.update({name: with_(stored[name], dtype="I8")}), "as I8"),
    ],
)
def test_unfit_tensors(checkpoint: Path, change: Callable[[Any, str], None], message: str) -> None:
    stored = read_checkpoint(checkpoint)
    change(stored, "language_model.model.layers.0.mlp.up_proj.weight")
    with pytest.raises(ModelError, match=message):
        match_parameters(fake_model(checkpoint), stored)


def with_(tensor: StoredTensor, **changes: Any) -> StoredTensor:
    return StoredTensor(**{**tensor.__dict__, **changes})


@pytest.mark.parametrize("names", [("lm_head",), ("model.embed_tokens",), ("lm_head", "model.embed_tokens")])
def test_tied_embeddings(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Checkpoints hold either of two tied tensors, or both; both must then be the same."""
    config = preset_config("tiny")
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = True
    write_checkpoint(tmp_path / "tied", config, dtype="float32")
    path = tmp_path / "tied" / SINGLE_FILE
    tensors = load_file(path)
    weight = tensors.pop("language_model.model.embed_tokens.weight")
    tensors |= {f"language_model.{name}.weight": weight.clone() for name in names}
    save_file(tensors, path, {"format": "pt"})
    model = fake_model(tmp_path / "tied")
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    found = match_parameters(model, read_checkpoint(tmp_path / "tied"))
    assert found[id(model.lm_head.weight)].name in {f"language_model.{name}.weight" for name in names}
    if len(names) == 2:
        tensors["language_model.lm_head.weight"][0, 0] += 1
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(ModelError, match="tie_word_embeddings"):
            match_parameters(model, read_checkpoint(tmp_path / "tied"))


@pytest.mark.parametrize("preset", [case.preset for case in CASES])
def test_head_of_each_family(tmp_path: Path, preset: str) -> None:
    """A tied head is the tensor of the embeddings, any other has its own."""
    config = preset_config(preset)
    write_checkpoint(tmp_path / "source", config, dtype="float32")
    model, stored = fake_model(tmp_path / "source"), read_checkpoint(tmp_path / "source")
    found = match_parameters(model, stored)
    head, embeddings = (found[id(part.weight)] for part in (model.lm_head, model.get_input_embeddings()))
    assert ("lm_head.weight" in {name.removeprefix("language_model.") for name in stored}) != config.tie_word_embeddings
    assert (head is embeddings) == config.tie_word_embeddings
    assert len(set(found.values())) == len(stored)


def test_other_families_than_llava_have_both_kinds_of_heads() -> None:
    configs = [preset_config(case.preset) for case in CASES]
    assert {config.tie_word_embeddings for config in configs if config.model_type != "llava"} == {True, False}


def place(stored: dict[str, StoredTensor], dtype: str, directory: Path) -> tuple[WeightPlan, dict[str, torch.Tensor]]:
    """Carry out the plan for all tensors; returns what then lies at their places."""
    written = 0

    def count(number: int) -> None:
        nonlocal written
        written += number

    plan = plan_weights(stored.values(), dtype)
    places, files = place_weights(plan, stored.values(), directory, count)
    assert written == plan.written_bytes()
    assert set(files) == {path.name for path in directory.iterdir()}
    for name, info in files.items():
        data = (directory / name).read_bytes()
        assert (info.bytes, info.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    result = {}
    for name, tensor in stored.items():
        where = places[tensor]
        data = (directory / where.file).read_bytes()[where.offset : where.offset + where.length]
        result[name] = torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).reshape(tensor.shape)
    return plan, result


def all_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in checkpoint.glob("*.safetensors") for name, value in load_file(path).items()}


def test_weights_of_the_right_dtype_are_copied(checkpoint: Path, tmp_path: Path) -> None:
    plan, placed = place(read_checkpoint(checkpoint), "float32", tmp_path)
    assert (len(plan.copies), plan.shards) == (3, [])
    for path in checkpoint.glob("*.safetensors"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
        assert not (tmp_path / path.name).is_symlink()
    for name, value in all_tensors(checkpoint).items():
        assert torch.equal(placed[name], value)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_weights_are_converted_in_blocks(
    checkpoint: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_BLOCK", 4096)
    monkeypatch.setattr(weights, "SHARD_BYTES", 300_000)
    plan, placed = place(read_checkpoint(checkpoint), dtype, tmp_path)
    assert plan.copies == []
    assert len(plan.shards) > 3
    for name, value in all_tensors(checkpoint).items():
        assert torch.equal(placed[name], value.to(getattr(torch, dtype)))
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (no dict)
                assert torch.equal(reader.get_tensor(name), placed[name])


def test_a_file_of_two_dtypes_is_converted(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(5, 3, dtype=torch.float64), "b": torch.randn(7).bfloat16(), "c": torch.randn(2).half()}
    save_file(tensors, tmp_path / SINGLE_FILE)
    target = tmp_path / "target"
    target.mkdir()
    _, placed = place(read_checkpoint(tmp_path), "bfloat16", target)
    for name, value in tensors.items():
        assert torch.equal(placed[name], value.to(torch.bfloat16))


def test_values_beyond_the_dtype_are_counted_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_BLOCK", 8)
    tensors = {
        "a": torch.tensor([1.0, 70000.0, 65504.0, float("inf")]),
        "b": torch.tensor([-66000.0, float("nan"), 1e30]),
    }
    save_file(tensors, tmp_path / SINGLE_FILE)
    stored = read_checkpoint(tmp_path)

    def write(dtype: str) -> None:
        for path in tmp_path.glob("weights-*"):
            path.unlink()
        place_weights(plan_weights(stored.values(), dtype), stored.values(), tmp_path, lambda count: None)

    with pytest.raises(ModelError) as caught:
        write("float16")
    expected = "3 weights are beyond the range of float16, which ends at 65504, in b (2) and 1 other tensor; "
    assert str(caught.value) == f"{expected}give --dtype bfloat16 or float32"
    with pytest.raises(ModelError, match="1 weight is beyond the range of float16, which ends at 65504, in a; give"):
        load_tensor(stored["a"], torch.float16)
    write("bfloat16")


def test_infinities_stay(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1.0, float("inf")])}, tmp_path / SINGLE_FILE)
    target = tmp_path / "target"
    target.mkdir()
    _, placed = place(read_checkpoint(tmp_path), "float16", target)
    assert placed["a"].tolist() == [1.0, float("inf")]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_random_checkpoint_loads_in_transformers(
    tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "random"
    assert main([str(directory), "--dtype", dtype, "--layers", "1"]) == 0
    assert "GB of weights" in capsys.readouterr().out
    model, report = (
        resolve(directory).family.model_class().from_pretrained(directory, dtype="auto", output_loading_info=True)
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.text_config.num_hidden_layers == 1
    assert model.lm_head.weight.dtype == getattr(torch, dtype)
    assert torch.isfinite(model.lm_head.weight).all()
    assert main([str(directory)]) == 2
    assert "cannot make the directory" in capsys.readouterr().err
    with pytest.raises(StorageError):
        write_checkpoint(tmp_path / "absent" / "x", preset_config("tiny"))


def test_a_sparse_checkpoint_takes_no_room(tmp_path: Path) -> None:
    config = preset_config("tiny")
    total = write_checkpoint(tmp_path / "sparse", config, sparse=True)
    assert total == write_checkpoint(tmp_path / "full", config)
    sparse, full = (read_checkpoint(tmp_path / name) for name in ("sparse", "full"))
    places = [(tensor.name, tensor.shape, tensor.offset, tensor.length) for tensor in full.values()]
    assert places == [(tensor.name, tensor.shape, tensor.offset, tensor.length) for tensor in sparse.values()]
    assert all(not load_tensor(tensor, torch.float32).any() for tensor in sparse.values())
    file = (tmp_path / "sparse" / SINGLE_FILE).stat()
    assert 512 * file.st_blocks < file.st_size / 10
