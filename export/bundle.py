"""``export_model``: from a checkpoint to a bundle, which is there whole or not at all."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING

from vkvx import __version__
from vkvx.errors import ModelError
from vkvx.export.options import ExportOptions
from vkvx.manifest import FileInfo, Manifest, Progress, sha256
from vkvx.models.checkpoint import CONFIG_FILE, INDEX_FILE, StoredTensor, read_checkpoint
from vkvx.models.family import GENERATION_FILE, Source
from vkvx.models.processor_files import ProcessorFiles
from vkvx.models.registry import origin_for, resolve
from vkvx.packages import EXPORT, missing, require
from vkvx.plugins.operator import VERSION
from vkvx.sampling import GenerationInfo
from vkvx.storage import can_share_blocks, check_output, check_room, new_directory

if TYPE_CHECKING:
    from vkvx.export.build import BuiltModel
    from vkvx.export.weights import Place

LOG = logging.getLogger("vkvx.export")
TOOLS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")
PROCESSOR = "processor"
GOLDEN_WEIGHTS = 1 << 30
"""Most bytes of weights for which an export runs the bundle once; see :mod:`vkvx.runtime.backends.golden`."""
_RESERVE = 8 << 20
"""Bytes that the graphs and the processor may take."""


def export_model(
    name: str | Path, output: str | Path, options: ExportOptions | None = None, progress: Progress | None = None
) -> Manifest:
    """Export a model to the bundle directory ``output`` and return the bundle's manifest.

    Args:
        name: alias, directory of a checkpoint, or hub id.
        output: where the bundle shall be. With ``options.force`` an older bundle there is replaced once the new one is
            complete; a directory with anything else in it is never touched.
        options: see :class:`ExportOptions`.
        progress: called as progress(stage, done, total) with the stages "load", "decoder", "vision", "weights" (in
            bytes) and "finish".

    Raises:
        OptionError, ModelError, StorageError, DependencyError: nothing is left behind.

    What generation_config.json asks for and no sampler here can do is named in a warning of the logger ``vkvx.export``.
    """
    options = options or ExportOptions()
    report: Progress = progress or (lambda stage, done, total: None)
    require("export", *EXPORT)
    options.check()
    target = Path(output).expanduser().absolute()
    check_output(target, options.force)
    report("load", 0, 1)
    try:
        from vkvx.export.build import build
    except ImportError as error:
        raise missing("torch", error) from error
    source = resolve(
        name,
        cache_dir=options.cache_dir,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )
    source = replace(source, origin=origin_for(source, target), limits=options.limits)
    stored = read_checkpoint(source.directory)
    processor, generation = source.processor(), source.generation()
    processor.check_tokens(
        source.info(options.dtype), lambda words: ModelError(f"{source.directory}: {words}; fix its tokenizer files")
    )
    report("load", 1, 1)
    with new_directory(target, options.force) as partial:
        _check_room(partial, stored, options.dtype)
        model = build(source, stored, options, report)
        manifest = _write(partial, source, model, processor, generation, report)
    report("finish", 1, 1)
    if generation.ignored:
        LOG.warning(
            "%s asks for %s, which is left out: answers may differ from those of generate()",
            *(GENERATION_FILE, ", ".join(generation.ignored)),
        )
    return manifest


def _check_room(directory: Path, stored: Mapping[str, StoredTensor], dtype: str) -> None:
    """Before any work: the weights take nearly all of a bundle."""
    from vkvx.export.weights import plan_weights

    plan = plan_weights(stored.values(), dtype)
    shared = bool(plan.copies) and can_share_blocks(plan.copies[0], directory)
    check_room(directory.parent, plan.written_bytes(shared) + _RESERVE)


def _write(
    directory: Path,
    source: Source,
    model: BuiltModel,
    processor: ProcessorFiles,
    generation: GenerationInfo,
    report: Progress,
) -> Manifest:
    from vkvx.export.build import operator_functions, refer, write_graph, write_metrics
    from vkvx.export.weights import place_weights, plan_weights

    plan = plan_weights(model.weights, model.info.dtype)
    total, done = plan.written_bytes(), 0

    def count(written: int) -> None:
        nonlocal done
        done += written
        report("weights", done, total)

    places, files = place_weights(plan, model.weights, directory, count)
    report("finish", 0, 1)
    write_metrics(model, directory)
    for built in (model.vision, model.decoder):
        refer(built, places, model.info.dtype)
        functions = operator_functions(built, model) if built is model.decoder else []
        write_graph(built.traced.model, directory / built.graph.file, functions)
    _write_checkpoint(directory, source, places)
    processor.save(directory / PROCESSOR)
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        if name not in files:
            files[name] = FileInfo(path.stat().st_size, sha256(path))
    manifest = Manifest(
        vkvx_version=__version__,
        operator_version=VERSION,
        model=model.info,
        quantization=model.quantization,
        graphs={"vision": model.vision.graph, "decoder": model.decoder.graph},
        processor=PROCESSOR,
        files=dict(sorted(files.items())),
        tools={"python": platform.python_version(), **{tool: version(tool) for tool in TOOLS}},
        generation=generation,
        calibration=model.calibration,
    )
    if _can_record(manifest, directory):
        # NumPy comes with them, which the command line does without.
        from vkvx.runtime.backends import golden
        from vkvx.runtime.backends.registry import open_backend

        tokens = golden.picture(manifest).tokens
        backend = open_backend(
            *("onnxruntime", directory, manifest),
            slots=1,
            visual_tokens=tokens,
            text_tokens=golden.TEXT_TOKENS,
            provider="cpu",
        )
        path = golden.record(backend, directory)
        files = {**manifest.files, path.name: FileInfo(path.stat().st_size, sha256(path))}
        manifest = replace(manifest, files=dict(sorted(files.items())))
    manifest.save(directory)
    return Manifest.load(directory)


def _can_record(manifest: Manifest, directory: Path) -> bool:
    """Whether the bundle gets a golden sample: onnxruntime holds all weights in memory for it."""
    from vkvx.runtime.backends import golden

    model = manifest.model
    weights = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    if golden.picture(manifest).tokens + golden.TEXT_TOKENS > model.max_positions:
        return False
    return weights <= GOLDEN_WEIGHTS and find_spec("onnxruntime") is not None


def _write_checkpoint(directory: Path, source: Source, places: Mapping[StoredTensor, Place]) -> None:
    """What makes the bundle a checkpoint that transformers can load: the config, and the index of the weights."""
    copyfile(source.directory / CONFIG_FILE, directory / CONFIG_FILE)
    total = sum(place.length for place in places.values())
    files = {tensor.name: place.file for tensor, place in sorted(places.items(), key=lambda item: item[0].name)}
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
