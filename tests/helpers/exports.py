"""Checkpoints and bundles that tests share: made once a run, whatever process of pytest-xdist asks first."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from vkvx.export.options import ExportOptions

if TYPE_CHECKING:
    from families import Case


class Exports:
    """What is in ``folder``, which the processes of a run share. Nothing in it is to be changed.

    Bundles of one checkpoint have the same vision tower, whatever their bits: a process traces it for the first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._towers: dict[tuple[object, ...], Any] = {}

    def once(self, name: str, make: Callable[[Path], object]) -> Path:
        """The path ``name``, which ``make`` writes if no process has done so yet."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        with path.with_name(f"{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():  # exports and checkpoints appear whole, or the test fails
                make(path)
        return path

    def family(self, case: Case) -> Path:
        """The checkpoint of a case: random weights in FP32."""
        from vkvx.models.presets import preset_config
        from vkvx.models.random_checkpoint import write_checkpoint

        def make(path: Path) -> None:
            write_checkpoint(path, preset_config(case.preset), dtype="float32", seed=case.seed)

        return self.once(f"seed-{case.seed}/{case.preset}", make)

    def bundle(self, checkpoint: str | Path, **options: Any) -> Path:
        """The bundle of a checkpoint, an alias or a folder with a name of its own, with these ExportOptions."""
        from vkvx import export_model

        chosen = ExportOptions(**options)
        given = {field.name: getattr(chosen, field.name) for field in fields(chosen)}
        own = [f"{field.name}_{given[field.name]}" for field in fields(chosen) if given[field.name] != field.default]
        name = "-".join(["bundle", Path(checkpoint).name, *own]).replace("/", "_").replace(":", "_")

        def make(path: Path) -> None:
            key = (str(checkpoint), chosen.dtype, chosen.opset, chosen.limits)
            with patch("vkvx.export.build.trace", self._tracer(key)):
                export_model(checkpoint, path, chosen)

        return self.once(name, make)

    def _tracer(self, key: tuple[object, ...]) -> Callable[..., Any]:
        from vkvx.export.build import Traced, trace
        from vkvx.models.graph.vision import VisionGraph

        def traced(module: Any, *arguments: Any, **more: Any) -> Any:
            if not isinstance(module, VisionGraph):
                return trace(module, *arguments, **more)
            if key in self._towers:
                model, names = self._towers[key]
                parameters = dict(module.named_parameters(remove_duplicate=False))
                return Traced(model.clone(), {name: parameters[name] for name in names})
            first = trace(module, *arguments, **more)
            self._towers[key] = first.model.clone(), tuple(first.parameters)  # the export goes on to change its own
            return first

        return traced
