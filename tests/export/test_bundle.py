"""``export_model`` from end to end: what a bundle holds, and that a failed export leaves nothing behind."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from os.path import relpath
from pathlib import Path
from typing import Any

import pytest

from vkvx import ExportOptions, export_model
from vkvx.errors import ModelError, OptionError, StorageError
from vkvx.export.build import BuiltModel, build
from vkvx.manifest import LayerInfo, Manifest
from vkvx.models.checkpoint import read_checkpoint
from vkvx.models.registry import resolve
from vkvx.packages import extra
from vkvx.runtime.sessions.processor import Processor

OPTIONS = ExportOptions(dtype="float16", bits=16)


def test_manifest_tells_all(checkpoint: Path, mixed_bundle: Path) -> None:
    manifest = Manifest.load(mixed_bundle)
    manifest.verify(mixed_bundle)
    model = manifest.model
    assert (model.name, model.source, model.revision) == ("tiny-random", relpath(checkpoint, mixed_bundle), None)
    assert (model.architecture, model.dtype, len(model.layers)) == ("LlavaForConditionalGeneration", "float32", 2)
    layer = LayerInfo(kv_heads=2, head_dim=64, scale=0.125)
    assert (model.query_heads, model.hidden_size, set(model.layers)) == (4, 128, {layer})
    assert (model.vocab_size, model.max_positions, model.image_token_id) == (512, 4096, 3)
    assert (model.tokens_per_picture, model.eos_token_ids, model.pad_token_id) == (16, (2,), 0)
    q = manifest.quantization
    assert (q.key_bits, q.value_bits, q.group_size, q.quantizer) == ((8, 1), (8, 1), 128, "shaped")
    assert manifest.tools.keys() >= {"python", "torch", "transformers", "onnx"}
    files = {path.relative_to(mixed_bundle).as_posix() for path in mixed_bundle.rglob("*") if path.is_file()}
    assert files == {*manifest.files, "vkvx.json"}
    assert not any(path.is_symlink() for path in mixed_bundle.rglob("*"))


def test_no_file_tells_where_it_was_made(checkpoint: Path, mixed_bundle: Path) -> None:
    for path in mixed_bundle.rglob("*"):
        for folder in (checkpoint.parent, mixed_bundle.parent, Path(__file__).parents[2], Path.home()):
            assert path.is_dir() or f"{folder}/".encode() not in path.read_bytes(), path


def test_processor_gives_as_many_tokens_as_the_tower(mixed_bundle: Path) -> None:
    from PIL import Image

    processor = Processor.of_bundle(mixed_bundle, Manifest.load(mixed_bundle))
    done = processor.prepare("<image> what?", [Image.new("RGB", (70, 50))])
    assert done.vision_calls[0]["pixel_values"].shape == (1, 3, 56, 56)
    assert (done.token_ids == 3).sum() == 16
    config = json.loads((mixed_bundle / "processor" / "preprocessor_config.json").read_text())
    assert config["image_processor_type"].startswith("CLIPImageProcessor")
    assert json.loads((mixed_bundle / "processor" / "tokenizer_config.json").read_text())["backend"] == "tokenizers"


@pytest.fixture(scope="module")
def built(checkpoint: Path) -> BuiltModel:
    return build(resolve(checkpoint), read_checkpoint(checkpoint), OPTIONS, lambda stage, done, total: None)


@pytest.fixture
def quick(built: BuiltModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace once for all tests that are about what comes before and after."""
    monkeypatch.setattr("vkvx.export.build.build", lambda *arguments: built)


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to spoil."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A directory for the output: what is in it after a failure was left behind."""
    (tmp_path / "room").mkdir()
    return tmp_path / "room"


@pytest.mark.usefixtures("quick")
def test_progress_and_replacement(checkpoint: Path, room: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    manifest = export_model(checkpoint, room / "out", OPTIONS, lambda *call: calls.append(call))
    assert manifest == Manifest.load(room / "out")
    stages = list(dict.fromkeys(stage for stage, _, _ in calls))
    assert stages == ["load", "weights", "finish"]  # and those of `build`
    for stage in stages:
        counts = [(done, total) for name, done, total in calls if name == stage]
        assert counts == sorted(counts)
        assert counts[-1][0] == counts[-1][1]
    before = (room / "out" / "vkvx.json").read_bytes()
    with pytest.raises(StorageError, match="--force"):
        export_model(checkpoint, room / "out", OPTIONS)
    (room / "out" / "engines").mkdir()
    export_model(checkpoint, room / "out", ExportOptions(**{**OPTIONS.__dict__, "force": True}))
    assert not (room / "out" / "engines").exists()
    assert (room / "out" / "vkvx.json").read_bytes() == before  # the same model gives the same bytes
    assert [path.name for path in room.iterdir()] == ["out"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("stage", ["load", "weights", "finish"])
def test_interrupted(checkpoint: Path, room: Path, stage: str) -> None:
    def interrupt(name: str, done: int, total: int) -> None:
        if name == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_model(checkpoint, room / "out", OPTIONS, interrupt)
    assert list(room.iterdir()) == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("limit", [4096, 400_000])
def test_no_room_for_a_file(checkpoint: Path, room: Path, limit: int) -> None:
    """The system refuses to write beyond the limit, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(StorageError, match="no room left"):
            export_model(checkpoint, room / "out", OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(room.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_a_disk_that_is_too_small_is_noticed_first(
    checkpoint: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 1 << 20
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))  # type: ignore[attr-defined]
    stages: list[str] = []
    with pytest.raises(StorageError, match=r"takes 9\.\d MB, .* has 1\.0 MB left"):
        export_model(checkpoint, room / "out", OPTIONS, lambda stage, done, total: stages.append(stage))
    assert set(stages) == {"load"}
    assert list(room.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_what_a_checkpoint_asks_of_answers(copy: Path, room: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = {"do_sample": True, "temperature": 0.2, "suppress_tokens": [9], "num_beams": 3, "min_p": 0.1}
    (copy / "generation_config.json").write_text(json.dumps(given))
    manifest = export_model(copy, room / "out", OPTIONS)
    assert manifest.generation.rules() == {"temperature": 0.2, "top_k": 50, "suppress_tokens": (9,)}
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "vkvx.export"]
    assert warning.startswith("generation_config.json asks for min_p, num_beams, which is left out: ")


def refused(source: Path | str, room: Path, message: str, options: ExportOptions = OPTIONS) -> None:
    with pytest.raises((ModelError, OptionError), match=message) as caught:
        export_model(source, room / "out", options)
    assert "\n" not in str(caught.value)
    assert list(room.iterdir()) == []


def test_truncated_weights(copy: Path, room: Path) -> None:
    with (copy / "model-00003-of-00003.safetensors").open("r+b") as file:
        file.truncate(1000)
    refused(copy, room, r"model-00003-of-00003\.safetensors is truncated")


def test_missing_weights(copy: Path, room: Path) -> None:
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    index["weight_map"].pop("language_model.model.norm.weight")
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(copy, room, r"lacks the tensor model\.language_model\.norm\.weight")


def test_weights_of_another_model(copy: Path, room: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 512
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy, room, "belong to different models")


def test_bad_options(checkpoint: Path, room: Path) -> None:
    refused(checkpoint, room, "layers 0 to 1", ExportOptions(bits_per_layer="0-2:8"))
    refused(checkpoint, room, "3 bits", ExportOptions(bits=3))
    refused("nonsense", room, "unknown model")


def test_without_a_processor(copy: Path, room: Path) -> None:
    (copy / "preprocessor_config.json").unlink()
    (copy / "tokenizer.json").unlink()
    refused(copy, room, "holds no tokenizer")


def test_pictures_of_the_wrong_size(copy: Path, room: Path) -> None:
    change_processor(copy, lambda config: config.update(crop_size={"height": 70, "width": 70}))
    refused(copy, room, r"pictures of \[70\] pixels, the vision tower takes 56; fix preprocessor_config\.json")
    # Newer checkpoints have one file for all of a processor, which comes first.
    path = copy / "preprocessor_config.json"
    nested = {"image_processor": json.loads(path.read_text())}
    (copy / "processor_config.json").write_text(json.dumps(nested))
    refused(copy, room, r"the vision tower takes 56; fix processor_config\.json")


def test_wrong_image_token(copy: Path, room: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["image_token_index"] = 7
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy, room, "image_token_index")


def change_processor(directory: Path, change: Any) -> None:
    path = directory / "preprocessor_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_missing_packages_are_named(checkpoint: Path, room: Path) -> None:
    code = (
        "import sys\nsys.modules |= {'onnx_ir': None, 'onnxscript': None}\n"
        "from vkvx import DependencyError, export_model\n"
        "try:\n    export_model(sys.argv[1], sys.argv[2])\nexcept DependencyError as error:\n    print(error)"
    )
    command = [sys.executable, "-c", code, str(checkpoint), str(room / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"the Python packages 'onnx-ir' and 'onnxscript' are missing; run {extra('export')}\n" == done.stdout
    assert list(room.iterdir()) == []
