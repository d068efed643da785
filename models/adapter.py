"""What an adapter tells about a model family. The modules stay Hugging Face's own; an adapter only points at them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkvx.manifest import ModelInfo, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Source:
    """A checkpoint on this machine.

    ``name`` is for people; ``origin`` is what :func:`vkvx.models.registry.resolve` finds the same checkpoint by: an
    alias, a hub id, or an absolute path; ``revision`` is the commit of a hub checkpoint; ``config`` is transformers'.
    """

    name: str
    origin: str
    directory: Path
    config: Any
    adapter: Adapter
    revision: str | None
    trust_remote_code: bool = False


class Adapter(ABC):
    """One model family. ``config`` and ``model`` are the family's transformers objects."""

    architecture: str
    """Entry of ``architectures`` in config.json, and name of the transformers class."""

    @abstractmethod
    def check(self, config: Any) -> None:
        """Raise ModelError if this checkpoint has a trait that the export cannot honour."""

    @abstractmethod
    def info(self, source: Source, dtype: str) -> ModelInfo:
        """The facts that the runtime needs."""

    @abstractmethod
    def pixel_inputs(self, config: Any) -> tuple[TensorSpec, ...]:
        """Inputs of the vision graph, named and shaped as the image processor gives them."""

    @abstractmethod
    def text_model(self, model: Any) -> nn.Module:
        """The decoder without its head: takes ``inputs_embeds`` and ``position_ids``."""

    @abstractmethod
    def image_embeds(self, model: Any, *pixel_inputs: Tensor) -> Tensor:
        """Embeddings [tokens of all pictures, hidden] of the pictures in ``pixel_inputs``."""

    def model_class(self) -> Any:
        """The transformers class of the model."""
        import transformers

        return getattr(transformers, self.architecture)

    def head(self, model: Any) -> nn.Module:
        """The language model's head, from hidden states to logits."""
        return model.get_output_embeddings()

    def check_processor(self, processor: Any, config: Any) -> None:  # noqa: B027 (optional)
        """Set what the processor lacks; raise ModelError if it does not fit the model."""
