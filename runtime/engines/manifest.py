"""The manifest of an engine directory, ``engine.json``: what was built, from what, for what, within which limits.

A directory ``BUNDLE/engines/BACKEND-CAPABILITY`` holds it beside ``decoder.engine``, ``vision.engine`` and, unless the
library is embedded or not needed, the plugin. Standard library only. Reading is strict about what a key must hold and
ignores keys it does not know: whatever changes the meaning of a directory raises ``FORMAT_VERSION``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from vkvx import typed_json
from vkvx.errors import EngineError
from vkvx.graph_specs import DTYPES, Graph, TensorSpec, difference
from vkvx.manifest import FILE_NAME as BUNDLE_FILE_NAME
from vkvx.manifest import FileInfo, ManifestFile, ManifestKind
from vkvx.typed_json import Dim, Entries, Index, OneOf, Sha256, Size, Written

FILE_NAME = "engine.json"
FORMAT = "vkvx-engines"
FORMAT_VERSION = 1
FOLDER = "engines"
"""Where a bundle keeps its engine directories."""
BACKENDS = ("tensorrt", "rtx")
DECODER, VISION = "decoder", "vision"
PREFILL, DECODE = "prefill", "decode"
Capability = Annotated[str, Written(r"\d{1,2}\.\d", "a compute capability such as 8.9")]


@dataclass(frozen=True)
class PluginInfo:
    """The library that holds the operator. ``file`` is a name in the directory, also of a library that is embedded
    in ``decoder.engine`` and therefore no file there."""

    file: str
    sha256: Sha256
    embedded: bool


@dataclass(frozen=True)
class Limits:
    """The most that the engines take.

    ``batch_size``: rows of a call; ``slots``: rows of the cache; ``input_len``: positions of a row in a call;
    ``visual_tokens`` and ``text_tokens``: capacity of a slot, the first a multiple of the group size, and 0 in a
    bundle of 16 bits, whose pictures lie among the text rows; ``pictures``: tiles in a call of the vision engine, or
    visual tokens of a picture where pictures are grids of patches.
    """

    batch_size: Size
    slots: Size
    input_len: Size
    visual_tokens: Index
    text_tokens: Size
    pictures: Size


@dataclass(frozen=True)
class Profile:
    """An optimisation profile. ``shapes`` maps each input of the engine to its least, best and largest shape."""

    engine: Annotated[str, OneOf((DECODER, VISION))]
    index: Index
    name: str
    shapes: dict[str, Annotated[tuple[tuple[Index, ...], ...], Entries(3, 3)]]

    def takes(self, tensor: str, shape: Sequence[int]) -> bool:
        """Whether a tensor may have this shape."""
        least, _, most = self.shapes[tensor]
        return len(shape) == len(least) and all(a <= given <= b for a, given, b in zip(least, shape, most, strict=True))


@dataclass(frozen=True)
class EngineTensor:
    """An input or output of an engine. ``kind`` is input or output; ``shape`` holds sizes and names of dimensions."""

    name: str
    kind: Annotated[str, OneOf(("input", "output"))]
    dtype: Annotated[str, OneOf(DTYPES)]
    shape: tuple[Dim, ...]
    engine: Annotated[str, OneOf((DECODER, VISION))]


@dataclass(frozen=True)
class EngineInfo:
    """One engine file. ``plugin_layers`` of its ``network_layers`` layers (before fusion) are the operator's."""

    file: str
    network_layers: Index
    plugin_layers: Index


@dataclass(frozen=True)
class EngineManifest(ManifestFile):
    """The whole of ``engine.json``. Make one with :meth:`load` or :meth:`from_json`; a build writes it.

    ``backend`` is one of ``BACKENDS``, ``library_version`` that of TensorRT, ``compute_capabilities`` such as "8.9".
    ``bundle_hash`` is :func:`bundle_hash` of the bundle; ``plugin`` is None where the engines need no library.
    ``aliases`` maps each output to the input whose memory it must be given (``present.0.text_key``: ``past.0...``).
    ``empty_visual_index``: whether a call without pictures has Nv = 0; if not, it has one group of -1 a row.
    ``options`` are those of the build, ``cache_key`` the hash of all that it depends on. Raises EngineError.
    """

    kind = ManifestKind(
        FILE_NAME,
        FORMAT,
        FORMAT_VERSION,
        EngineError,
        noun="engine directory",
        subject="the engines have",
        make="vkvx build BUNDLE",
        again="run `vkvx build BUNDLE` again",
        copy="copy the engines again, or run `vkvx build BUNDLE --force`",
        made="built",
        stage="verify engines",
    )

    vkvx_version: str
    operator_version: Index
    backend: Annotated[str, OneOf(BACKENDS)]
    library_version: str
    compute_capabilities: Annotated[tuple[Capability, ...], Entries(1, 64)]
    bundle_hash: Sha256
    plugin: PluginInfo | None
    limits: Limits
    empty_visual_index: bool
    engines: dict[str, EngineInfo]
    profiles: tuple[Profile, ...]
    tensors: tuple[EngineTensor, ...]
    aliases: dict[str, str]
    files: dict[str, FileInfo]
    options: dict[str, int | str | bool | None]
    cache_key: str

    def check_bundle(self, bundle: str | Path) -> None:
        """Raise EngineError unless the engines were built from this very bundle."""
        if bundle_hash(bundle) != self.bundle_hash:
            name = directory_name(self.backend, self.compute_capabilities)
            raise EngineError(
                f"the engines {name} were built from another state of the bundle {bundle}; "
                f"run `vkvx build {bundle}` again"
            )

    def check_graphs(self, graphs: Mapping[str, Graph]) -> None:
        """Raise EngineError unless the engines have the inputs and outputs of the bundle's ``graphs``."""
        for name in (DECODER, VISION):
            for kind, specs in (("input", graphs[name].inputs), ("output", graphs[name].outputs)):
                given = [TensorSpec(one.name, one.dtype, one.shape) for one in self.engine_tensors(name, kind)]
                if words := difference(given, specs):
                    raise self.kind.failure(f"{kind}s of the {name} engine and the bundle's graph differ: {words}")

    def profile(self, engine: str, name: str) -> Profile:
        """The profile of an engine by its name; KeyError if there is none."""
        for profile in self.profiles:
            if (profile.engine, profile.name) == (engine, name):
                return profile
        raise KeyError((engine, name))

    def engine_tensors(self, engine: str, kind: str) -> tuple[EngineTensor, ...]:
        """The inputs or outputs of one engine, in their order."""
        return tuple(tensor for tensor in self.tensors if (tensor.engine, tensor.kind) == (engine, kind))

    def _check(self) -> None:
        require = self.kind.require
        for name in (DECODER, VISION):
            require(name in self.engines, "engines", f'an object with the key "{name}"', sorted(self.engines))
        for name in self.files:
            if not typed_json.is_plain_path(name) or "/" in name:
                raise EngineError(f"{FILE_NAME}: the file {name!r} leaves the directory; do not trust these engines")
        for name, engine in self.engines.items():
            require(engine.file in self.files, f"engines.{name}.file", "listed in files", engine.file)
        if self.plugin is not None and not self.plugin.embedded:
            require(self.plugin.file in self.files, "plugin.file", "listed in files", self.plugin.file)
        names = {(tensor.engine, tensor.kind, tensor.name) for tensor in self.tensors}
        for profile in self.profiles:
            where = f"the shapes of profile {profile.name}"
            inputs = {name for engine, kind, name in names if (engine, kind) == (profile.engine, "input")}
            require(set(profile.shapes) == inputs, where, f"those of {sorted(inputs)}", sorted(profile.shapes))
            for shapes in profile.shapes.values():
                fits = len({len(shape) for shape in shapes}) == 1
                require(fits, where, "three of one length for each input", shapes)
        for name in (PREFILL, DECODE):
            known = any((profile.engine, profile.name) == (DECODER, name) for profile in self.profiles)
            require(known, "profiles", f"a list with one named {name}", [profile.name for profile in self.profiles])
        for present, past in self.aliases.items():
            fits = (DECODER, "output", present) in names and (DECODER, "input", past) in names
            require(fits, "aliases", "names of an output and an input of the decoder", [present, past])


def bundle_hash(bundle: str | Path) -> str:
    """SHA-256 of a bundle's manifest, which holds the SHA-256 of every other file. Raises EngineError."""
    path = Path(bundle) / BUNDLE_FILE_NAME
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}; give the directory of a bundle") from error


def directory_name(backend: str, compute_capabilities: Sequence[str]) -> str:
    """Name of an engine directory: ``tensorrt-9.0``, ``rtx-8.6+8.9``."""
    return f"{backend}-{'+'.join(compute_capabilities)}"


def engine_directories(bundle: str | Path) -> list[Path]:
    """The engine directories of a bundle, by name; whether they can be used is for :meth:`EngineManifest.load`."""
    return sorted(path.parent for path in (Path(bundle) / FOLDER).glob(f"[!.]*/{FILE_NAME}"))
