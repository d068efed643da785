"""What a comparison of two runs of a bundle found, and how it is told."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from vkvx.runtime.sessions.nonfinite import OVERFLOW

VISION_OUTPUT = "image_embeds"


@dataclass(frozen=True)
class Check:
    """One comparison. ``max_difference`` and ``tolerance`` have the unit that ``detail`` names.

    ``is_finite`` is False where either side has an infinity or NaN; the difference is infinite then.
    """

    name: str
    phase: str
    layer: int | None
    max_difference: float
    tolerance: float
    passed: bool
    detail: str = ""
    is_finite: bool = True


@dataclass
class Report:
    """All comparisons of one bundle."""

    bundle: str
    model: str
    dtype: str
    provider: str
    backend: str = "onnxruntime"
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every comparison is within its tolerance."""
        return all(check.passed for check in self.checks)

    @property
    def first_divergent_layer(self) -> int | None:
        """The lowest layer with a failed comparison in the earliest phase that has one."""
        failed = [check for check in self.checks if not check.passed and check.layer is not None]
        if not failed:
            return None
        return min(c.layer for c in failed if c.phase == failed[0].phase and c.layer is not None)

    @property
    def first_divergence(self) -> str | None:
        """The part of the model that fails first: "the vision output" or "layer 3"; None where no such part does."""
        failed = next((check for check in self.checks if not check.passed), None)
        if failed is not None and failed.name == VISION_OUTPUT:
            return "the vision output"
        layer = self.first_divergent_layer
        return None if layer is None else f"layer {layer}"

    @property
    def remedy(self) -> str | None:
        """What helps where something is not finite."""
        if all(check.is_finite for check in self.checks):
            return None
        return OVERFLOW if self.dtype == "float16" else "numbers are infinite or NaN: look at the checkpoint's weights"

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain types; numbers that are infinite or NaN are None, which JSON has no others for."""
        return {
            **{name: getattr(self, name) for name in ("bundle", "model", "dtype", "provider", "backend")},
            "passed": self.passed,
            "first_divergence": self.first_divergence,
            "first_divergent_layer": self.first_divergent_layer,
            "remedy": self.remedy,
            "checks": [
                {
                    name: None if isinstance(value, float) and not isfinite(value) else value
                    for name, value in asdict(check).items()
                }
                for check in self.checks
            ],
        }
