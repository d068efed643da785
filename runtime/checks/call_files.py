"""Decoder calls as files of Polygraphy: the inputs that a backend got, and what it made of them.

``polygraphy run decoder.onnx --load-inputs FILE --load-outputs FILE`` runs them again elsewhere and compares.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vkvx.errors import OptionError
from vkvx.manifest import Manifest
from vkvx.packages import missing, require
from vkvx.runtime.calls import Call
from vkvx.storage import check_file, write_file

if TYPE_CHECKING:
    from vkvx.runtime.backends.base import Backend

OPTIONS = {"save_inputs": "save_inputs= (--save-inputs)", "save_outputs": "save_outputs= (--save-outputs)"}


def check_call_files(manifest: Manifest, **paths: Path | None) -> None:
    """Whether these files, ``save_inputs`` and ``save_outputs``, can be written once there is something to write.

    Raises OptionError for a bundle in bfloat16, DependencyError without Polygraphy, StorageError for unusable paths.
    """
    given = {name: path for name, path in paths.items() if path is not None}
    if not given:
        return
    if manifest.model.dtype == "bfloat16":
        raise OptionError(
            f"{OPTIONS[next(iter(given))]} cannot hold bfloat16, which NumPy does not have: export the model in "
            "float16 or float32"
        )
    require("polygraphy", "polygraphy")
    for name, path in given.items():
        check_file(path, OPTIONS[name])
    if len({path.resolve() for path in given.values()}) < len(given):
        raise OptionError(f"{' and '.join(OPTIONS.values())} name one file; give two")


class CallFiles:
    """Keeps each decoder call that goes through :meth:`step`: all inputs and outputs of the graph, caches and counts.

    Caches are those of all slots, as they lie in memory. What is at or past the counts is unspecified, but a graph
    leaves it as it is, so that it does not differ between two runs of the same inputs.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._inputs, self._outputs = list[dict[str, np.ndarray]](), list[dict[str, np.ndarray]]()

    def step(self, call: Call, visual_embeds: Any | None) -> np.ndarray:
        """:meth:`vkvx.runtime.backends.base.Backend.step`."""
        model, specs = self._backend.manifest.model, self._backend.manifest.graphs["decoder"]
        embeds = visual_embeds
        if embeds is None:
            embeds = np.zeros((*call.visual_index.shape, model.embed_width))
        named = {**call.inputs, **self._caches("past", ""), "visual_embeds": np.asarray(embeds, model.dtype)}
        self._inputs.append({spec.name: named[spec.name] for spec in specs.inputs})
        logits = self._backend.step(call, visual_embeds)
        named = {"logits": logits.copy(), **self._caches("present", "_out")}
        self._outputs.append({spec.name: named[spec.name] for spec in specs.outputs})
        return logits

    def _caches(self, prefix: str, suffix: str) -> dict[str, np.ndarray]:
        cache = self._backend.cache
        buffers = {f"{prefix}.{name}": cache.read(name).copy() for name in cache.buffers}
        counts = {"visual_count": cache.visual_count.copy(), "text_count": cache.text_count.copy()}
        return buffers | {f"{name}{suffix}": array for name, array in counts.items()}

    def save(self, inputs: Path | None, outputs: Path | None) -> None:
        """Write both files, as JSON; older ones are replaced. Raises DependencyError and StorageError."""
        try:
            from polygraphy.comparator import RunResults
            from polygraphy.json import to_json
        except ImportError as error:
            raise missing("polygraphy", error) from error
        if inputs is not None:
            write_file(inputs, to_json(self._inputs))
        if outputs is not None:
            results = RunResults()
            results.add(self._outputs, runner_name=f"vkvx-{self._backend.name}")
            write_file(outputs, results.to_json())
