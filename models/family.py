"""What an adapter tells about a model family. The modules stay Hugging Face's own; an adapter only points at them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkvx.errors import ModelError
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

    def info(self, dtype: str) -> ModelInfo:
        """The facts that the runtime needs. Raises ModelError if generation_config.json cannot be read."""
        info = self.adapter.info(self.config, dtype, self._generation_config())
        return replace(info, name=self.name, source=self.origin, revision=self.revision)

    def _generation_config(self) -> dict[str, Any]:
        path = self.directory / "generation_config.json"
        if not path.is_file():
            return {}
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read {path} ({error}); download the checkpoint again") from error
        return data if isinstance(data, dict) else {}


@dataclass(frozen=True)
class AttentionWeights:
    """What stands before the queries and after the attention of a layer: parameters of the model, or their values.

    ``query`` is [Hq * D, hidden], ``query_bias`` [Hq * D] or None, ``norm`` [hidden] the weight of the norm before the
    projection, ``output`` [hidden, Hq * D].
    """

    query: Tensor
    query_bias: Tensor | None
    norm: Tensor
    output: Tensor


class Adapter(ABC):
    """One model family. ``config`` and ``model`` are the family's transformers objects."""

    architecture: str
    """Entry of ``architectures`` in config.json, and name of the transformers class."""

    @abstractmethod
    def check(self, config: Any) -> None:
        """Raise ModelError if this checkpoint has a trait that the export cannot honour."""

    @abstractmethod
    def info(self, config: Any, dtype: str, generation: Mapping[str, Any] | None = None) -> ModelInfo:
        """The facts that config.json tells, and ``generation``, the contents of generation_config.json."""

    @abstractmethod
    def pixel_inputs(self, config: Any) -> tuple[TensorSpec, ...]:
        """Inputs of the vision graph, named and shaped as the image processor gives them."""

    @abstractmethod
    def text_model(self, model: Any) -> nn.Module:
        """The decoder without its head: takes ``inputs_embeds`` and ``position_ids``."""

    @abstractmethod
    def image_embeds(self, model: Any, *pixel_inputs: Tensor) -> Tensor:
        """Embeddings [tokens of all pictures, hidden] of the pictures in ``pixel_inputs``."""

    @abstractmethod
    def attention_weights(self, model: Any, layer: int) -> AttentionWeights:
        """The weights around the attention of a decoder layer."""

    @abstractmethod
    def rotary_embedding(self, model: Any) -> nn.Module:
        """The decoder's rotary embedding: from a tensor and positions [B, S] to cosine and sine [B, S, D]."""

    def model_class(self) -> Any:
        """The transformers class of the model."""
        import transformers

        return getattr(transformers, self.architecture)

    def head(self, model: Any) -> nn.Module:
        """The language model's head, from hidden states to logits."""
        return model.get_output_embeddings()

    def check_processor(self, processor: Any, config: Any) -> None:  # noqa: B027 (optional)
        """Set what the processor lacks; raise ModelError if it does not fit the model."""
