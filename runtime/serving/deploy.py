"""Writes what a server needs to serve a bundle: a model repository of Triton Inference Server."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vkvx.errors import OptionError, StorageError
from vkvx.manifest import FILE_NAME, Progress
from vkvx.runtime.backends.registry import BACKENDS
from vkvx.runtime.bundles import load_manifest
from vkvx.runtime.engines.manifest import BACKENDS as ENGINE_BACKENDS
from vkvx.runtime.sessions.pieces import check_cut_after_pictures, check_prefill_chunk
from vkvx.storage import can_share_blocks, check_room, share_blocks

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MODEL = '''"""The model of this directory; the code is in the package vkvx."""

from vkvx.runtime.serving.triton import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
_REPLACEABLE = {"config.pbtxt", "1"}
_BLOCK = 8 << 20
MODEL_DIRECTORY = "$$TRITON_MODEL_DIRECTORY"
"""What Triton replaces by the directory of the model at the start of an execution environment's path."""


def triton_config(
    name: str,
    *,
    backend: str = "auto",
    bundle: str = "bundle",
    slots: int = 8,
    visual_tokens: int | None = None,
    text_tokens: int | None = None,
    prefill_chunk: int | None = None,
    cut_after_pictures: bool = False,
    reuse: bool = True,
    max_waiting: int | None = None,
    deadline: float | None = None,
    threads: int | None = None,
    environment: str | None = None,
    gpus: Sequence[int] | None = None,
    instances: int = 1,
) -> str:
    """``config.pbtxt`` of a bundle served by Triton's Python backend.

    A request has ``prompt`` and optionally ``images`` (picture files as bytes, in base64, or as ``data:`` URIs),
    ``raw_prompt``, ``stream`` and the fields of GenerationOptions; a response ``text``, ``finish_reason`` (empty before
    the end) and ``token_ids``. The model is decoupled: with ``stream`` a response comes for each step, else one in all.
    Batches are formed over slots inside an instance, so Triton does not batch. ``gpus`` None: whatever Triton finds,
    ``()``: the CPU. ``threads`` are those of a CPU, ``environment`` is a Python environment for Triton to run it in.
    """
    from vkvx.runtime.serving.triton import INPUTS, LISTS

    outputs = [("text", "TYPE_STRING", 1), ("finish_reason", "TYPE_STRING", 1), ("token_ids", "TYPE_INT32", -1)]
    parameters: dict[str, Any] = {"bundle": bundle, "backend": backend, "slots": slots}
    parameters |= {} if max_waiting is None else {"max_waiting": max_waiting}
    parameters |= {"cut_after_pictures": "true"} if cut_after_pictures else {}
    parameters |= {} if reuse else {"reuse": "false"}
    parameters |= {} if deadline is None else {"deadline": deadline}
    parameters |= {} if visual_tokens is None else {"visual_tokens": visual_tokens}
    parameters |= {} if text_tokens is None else {"text_tokens": text_tokens}
    parameters |= {} if prefill_chunk is None else {"prefill_chunk": prefill_chunk}
    parameters |= {} if threads is None else {"threads": threads}
    parameters |= {} if environment is None else {"EXECUTION_ENV_PATH": environment}
    kind = "KIND_AUTO" if gpus is None else "KIND_GPU" if gpus else "KIND_CPU"
    devices = f"\n    gpus: {list(gpus)}" if gpus else ""
    lines = [f"name: {json.dumps(name)}", 'backend: "python"', "max_batch_size: 0"]
    for tensor, dtype in INPUTS.items():
        size = -1 if tensor in LISTS else 1
        extra = "" if tensor == "prompt" else "\n    optional: true"
        lines.append(f'input {{\n    name: "{tensor}"\n    data_type: {dtype}\n    dims: [{size}]{extra}\n}}')
    for tensor, dtype, size in outputs:
        lines.append(f'output {{\n    name: "{tensor}"\n    data_type: {dtype}\n    dims: [{size}]\n}}')
    lines.append("model_transaction_policy {\n    decoupled: true\n}")
    lines.append(f"instance_group {{\n    count: {instances}\n    kind: {kind}{devices}\n}}")
    for key, value in parameters.items():
        text = json.dumps(str(value))
        lines.append(f'parameters {{\n    key: "{key}"\n    value {{\n        string_value: {text}\n    }}\n}}')
    return "\n".join(lines) + "\n"


def write_triton_repository(
    bundle: str | Path,
    repository: str | Path,
    *,
    name: str | None = None,
    backend: str = "auto",
    reference: str | None = None,
    slots: int = 8,
    visual_tokens: int | None = None,
    text_tokens: int | None = None,
    prefill_chunk: int | None = None,
    cut_after_pictures: bool = False,
    reuse: bool = True,
    max_waiting: int | None = None,
    deadline: float | None = None,
    threads: int | None = None,
    environment: str | None = None,
    gpus: Sequence[int] | None = None,
    instances: int = 1,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Add a bundle to a model repository; returns the model's directory ``repository/name``.

    The bundle is copied, and shares its disk blocks where the file system can do that; with ``reference``, a path
    inside the server's container, nothing is copied. ``environment`` is a Python environment for Triton to run the
    model in: a directory with a ``bin/activate``, or the archive of one that conda-pack makes. It is a path as the
    server sees it, or begins with ``$$TRITON_MODEL_DIRECTORY``. ``threads`` without ``gpus`` mean the CPU.
    ``max_waiting`` and ``deadline`` are those of :class:`vkvx.Server`, of each instance; ``reuse`` and the others those
    of :meth:`Session.load`. ``progress`` is called with the stage "copy" and bytes. The directory appears whole or not
    at all.

    Raises:
        BundleError: if ``bundle`` is none.
        OptionError: for options that Triton or vkvx would refuse.
        StorageError: if the place is taken, too small for the bundle, or cannot be written.
    """
    gpus = (None if threads is None else ()) if gpus is None else tuple(gpus)
    source = Path(bundle).expanduser().absolute()
    manifest = load_manifest(source)
    model = name or re.sub(r"[^A-Za-z0-9._-]", "-", manifest.model.name)
    _check(model, backend, reference, slots, visual_tokens, text_tokens, threads, environment, gpus, instances)
    _check_queue(max_waiting, deadline)
    check_prefill_chunk(manifest, prefill_chunk)
    check_cut_after_pictures(manifest, cut_after_pictures)
    target = Path(repository).expanduser().absolute() / model
    if target.exists() and not (force and target.is_dir() and {x.name for x in target.iterdir()} <= _REPLACEABLE):
        hint = (
            "give --force to replace it, or another --name"
            if not force
            else "it is no model of vkvx; give another --name"
        )
        raise StorageError(f"{target} exists; {hint}")
    config = triton_config(
        model,
        backend=backend,
        bundle=reference or "bundle",
        slots=slots,
        visual_tokens=visual_tokens,
        text_tokens=text_tokens,
        prefill_chunk=prefill_chunk,
        cut_after_pictures=cut_after_pictures,
        reuse=reuse,
        max_waiting=max_waiting,
        deadline=deadline,
        threads=threads,
        environment=environment,
        gpus=gpus,
        instances=instances,
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Triton takes every directory of a repository for a model, but not one whose name starts with a dot.
        folder = Path(tempfile.mkdtemp(prefix=f".{model}-", dir=target.parent))
        try:
            version = folder / "1"
            version.mkdir()
            folder.chmod(0o755)
            (folder / "config.pbtxt").write_text(config, encoding="utf-8")
            (version / "model.py").write_text(_MODEL, encoding="utf-8")
            if reference is None:
                _copy(source, version / "bundle", target.parent, progress or (lambda *_: None))
            if target.exists():
                shutil.rmtree(target)
            os.replace(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"cannot write {target}: {error.strerror or error}; choose another repository with -o"
        ) from error
    return target


def _copy(source: Path, target: Path, repository: Path, progress: Progress) -> None:
    """Copy a bundle to a place in the repository. Raises StorageError before that if it does not fit."""
    sizes = [path.stat().st_size for path in source.rglob("*") if path.is_file()]
    if not can_share_blocks(source / FILE_NAME, target.parent):
        try:
            check_room(repository, sum(sizes))
        except StorageError as error:
            raise StorageError(f"{error}; or give --reference, which copies nothing") from error
    done = 0

    def copy(source: str, target: str) -> None:
        nonlocal done
        with open(source, "rb") as reader, open(target, "xb") as writer:
            shared = share_blocks(reader, writer)
            while not shared and (block := reader.read(_BLOCK)):
                writer.write(block)
                progress("copy", done + reader.tell(), sum(sizes))
            done += reader.seek(0, os.SEEK_END)
        shutil.copystat(source, target)

    shutil.copytree(source, target, copy_function=copy)
    progress("copy", done, sum(sizes))


def _check_queue(max_waiting: int | None, deadline: float | None) -> None:
    if max_waiting is not None and max_waiting < 1:
        raise OptionError(f"--max-waiting must be at least 1, got {max_waiting}")
    if deadline is not None and not 0 < deadline < float("inf"):
        raise OptionError(f"--deadline must be more than 0 seconds, got {deadline:g}")


def _check(
    name: str,
    backend: str,
    reference: str | None,
    slots: int,
    visual_tokens: int | None,
    text_tokens: int | None,
    threads: int | None,
    environment: str | None,
    gpus: Sequence[int] | None,
    instances: int,
) -> None:
    if not _NAME.fullmatch(name):
        raise OptionError(f"--name {name} is no name of a model; give letters, digits, '.', '_' and '-'")
    if backend not in ("auto", *BACKENDS):
        raise OptionError(f"unknown backend '{backend}' (--backend): give one of auto, {', '.join(BACKENDS)}")
    if reference is not None and not reference.startswith("/"):
        raise OptionError(f"--reference {reference} must be an absolute path, as the server sees it")
    for option, value, least in (
        ("--slots", slots, 1),
        ("--instances", instances, 1),
        ("--threads", threads, 1),
        ("--max-visual-tokens", visual_tokens, 0),
        ("--max-text-tokens", text_tokens, 1),
    ):
        if value is not None and value < least:
            raise OptionError(f"{option} must be at least {least}, got {value}")
    if threads is not None and gpus:
        raise OptionError("--threads are those of a CPU; leave them out, or give --gpus none")
    if backend in ENGINE_BACKENDS and (threads is not None or gpus == ()):
        raise OptionError(f"--backend {backend} runs on a GPU; leave out --threads and --gpus none, or give another")
    if environment is not None and not environment.startswith(("/", f"{MODEL_DIRECTORY}/")):
        raise OptionError(
            f"--environment {environment} must be an absolute path, as the server sees it, or begin with "
            f"'{MODEL_DIRECTORY}/'"
        )
    if gpus is not None and (len(set(gpus)) != len(gpus) or any(gpu < 0 for gpu in gpus)):
        raise OptionError(f"--gpus {','.join(map(str, gpus))} must be different numbers from 0")
