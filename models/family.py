"""What is known of a model family. The modules stay Hugging Face's own; a family only points at them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vkvx.errors import ModelError, VkvxError
from vkvx.format import WORD_BITS
from vkvx.manifest import LayerInfo, ModelInfo, PromptInfo, TensorSpec
from vkvx.models.generation_config import generation_info
from vkvx.models.pictures.kinds import Kind, describe
from vkvx.models.pictures.limits import NO_LIMITS, PixelLimits
from vkvx.models.videos import open_videos
from vkvx.sampling import GenerationInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vkvx.models.processor_files import ProcessorFiles

GENERATION_FILE = "generation_config.json"
STATIC_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
"""Rotary embeddings that depend on nothing but the position."""
PROCESSOR_FILES = {
    "tokenizer": ("tokenizer.json", "tokenizer.model", "vocab.json"),
    "image processor": ("preprocessor_config.json", "processor_config.json"),
}
"""Of each part of a processor the files that it may come in."""
QUANTISED = {"awq": "AWQ", "gptq": "GPTQ", "fp8": "FP8", "fbgemm_fp8": "FP8"}
"""Names for people of some values of ``quant_method``; the others are written as they are."""


@dataclass(frozen=True)
class Source:
    """A checkpoint on this machine.

    ``name`` is for people; ``origin`` is what :func:`vkvx.models.registry.resolve` finds the same checkpoint by: an
    alias, a hub id, or an absolute path; ``revision`` is the commit of a hub checkpoint; ``config`` is transformers'.
    ``limits`` are those of pictures, in place of the image processor's own.
    """

    name: str
    origin: str
    directory: Path
    config: Any
    family: Family
    revision: str | None
    trust_remote_code: bool = False
    limits: PixelLimits = NO_LIMITS

    def info(self, dtype: str) -> ModelInfo:
        """The facts that the runtime needs.

        Raises ModelError if generation_config.json or the image processor cannot be read, OptionError for ``limits``
        that do not suit.
        """
        info = self.family.info(self.config, dtype, self._generation_config())
        limited = self.family.pictures(self.config).limited
        if self.limits or (limited and self._has("image processor")):
            images = self._limited(self._images())
            info = replace(info, typical_tokens=self.family.limited_tokens(images))
        return replace(info, name=self.name, source=self.origin, revision=self.revision)

    def generation(self) -> GenerationInfo:
        """How the checkpoint wants its answers chosen. Raises ModelError if generation_config.json tells nonsense."""

        def fail(words: str) -> ModelError:
            return ModelError(f"{self.directory / GENERATION_FILE}: {words}; correct it, or download it again")

        return generation_info(self._generation_config(), fail)

    def processor(self) -> ProcessorFiles:
        """Tokenizer and image processor. Raises ModelError if their files do not load or do not fit the model."""
        from vkvx.models.processor_files import ProcessorFiles

        try:
            files = ProcessorFiles.load(self.directory, self.trust_remote_code)
        except VkvxError:
            raise
        except Exception as error:  # transformers and tokenizers raise whatever they come across
            for part, names in PROCESSOR_FILES.items():
                if not self._has(part):
                    raise ModelError(
                        f"{self.directory} holds no {part}: no {one_of(names)}; download the checkpoint again"
                    ) from error
            raise self._unreadable(error) from error
        token = files.tokenizer.convert_ids_to_tokens(self.config.image_token_id)
        if self.config.image_token_id not in files.tokenizer.added_tokens_decoder:
            raise ModelError(
                f"config.json says that pictures are token {self.config.image_token_id}, which is the tokenizer's "
                f"'{token}', a piece of plain text; fix image_token_id (image_token_index in older files)"
            )
        self.family.prepare_processor(files, self.config)
        if open_videos(self.family.pictures(self.config), files.videos, files.images) is None:
            files.videos = None
        self._limited(files.images)
        return files

    def _has(self, part: str) -> bool:
        return any((self.directory / name).is_file() for name in PROCESSOR_FILES[part])

    def _images(self) -> Any:
        from vkvx.models.processor_files import load_images

        try:
            return load_images(self.directory, self.trust_remote_code)
        except VkvxError:
            raise
        except Exception as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> ModelError:
        reason = " ".join(str(error).split())
        return ModelError(f"transformers cannot read the processor files in {self.directory}: {reason}")

    def _limited(self, images: Any) -> Any:
        """An image processor, with the limits that were asked for."""
        if self.limits:
            positions = self.config.text_config.max_position_embeddings
            images.size = self.limits.size(images, self.family.pictures(self.config).limited, positions)
        return images

    def _generation_config(self) -> dict[str, Any]:
        path = self.directory / GENERATION_FILE
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
    projection, ``output`` [hidden, Hq * D], ``query_norm`` [D] the weight of a norm of each head's query, or None.
    What the projection makes besides queries (a gate) stands behind the query of each head: [Hq * 2D, hidden] then.
    The norms add ``norm_shift`` to their weights.
    """

    query: Tensor
    query_bias: Tensor | None
    norm: Tensor
    output: Tensor
    query_norm: Tensor | None = None
    norm_shift: float = 0.0


VisionCalls = Sequence[Mapping[str, np.ndarray]]
"""Inputs of the vision graph, call by call."""


class Family(ABC):
    """One model family. ``config`` and ``model`` are the family's transformers objects.

    What is written here is that of a plain family: a vision tower and a projector, then a decoder built like Llama.
    """

    title: str
    """What people call the models."""
    architecture: str
    """Entry of ``architectures`` in config.json, and name of the transformers class."""
    text_models: tuple[str, ...]
    """Model types of the decoders that are let through: they are built alike."""
    tested_models: tuple[str, ...]
    """Those of them that tests compare with transformers."""
    aliases: Mapping[str, str | Path] = {}
    """Hub ids or directories of checkpoints by the short names that people may give."""
    packed_vision = False
    """Whether the tower takes lengths of segments; ``models.graph.vision`` has what is given in their place."""
    rotary_interleaved = False
    """Whether the rotary embedding turns neighbouring channels, not halves of a head."""
    prompt = PromptInfo()
    """How a prompt is written."""
    first_position = 0
    """Where the rotary embedding has the first token."""
    norm_shift = 0.0
    """What the decoder's norms add to their weights."""
    position_rows = 1
    """4 where the rotary embedding tells time, rows and columns of a picture apart."""

    def variant(self, config: Any) -> Family:
        """The family of a checkpoint, where its architecture alone does not tell; most have one."""
        return self

    def check(self, config: Any) -> None:
        """Raise ModelError if this checkpoint has a trait that the export cannot honour."""
        text = config.text_config
        method = _quantization_method(config) or _quantization_method(text)
        if method:
            raise ModelError(
                f"the checkpoint's weights are quantised ({method}); "
                "give the one that it was made from, with weights in FP16, BF16 or FP32"
            )
        if text.model_type not in self.text_models:
            raise ModelError(
                f"a {self.architecture} with a '{text.model_type}' decoder is not supported; "
                f"{one_of(self.text_models)} is"
            )
        layers = self.layers(config)
        declared = any(layer.sliding_window for layer in layers)
        window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
        positions = text.max_position_embeddings
        if window is not None and window < positions and not declared:
            raise ModelError(
                f"the decoder attends over a sliding window of {window} tokens of {positions}, which is not supported; "
                f"a checkpoint whose config.json has no sliding_window, or one of at least {positions}, is"
            )
        given = getattr(text, "rope_parameters", None) or {}
        for rope in (one.get("rope_type", "default") for one in (given, *given.values()) if isinstance(one, Mapping)):
            if rope not in STATIC_ROPE:
                raise ModelError(f"rotary embeddings of type '{rope}' are not supported; {one_of(STATIC_ROPE)} is")
        for dim in dict.fromkeys(layer.head_dim for layer in layers):
            if dim % WORD_BITS:
                raise ModelError(f"the head dim is {dim}; the packed cache needs a multiple of {WORD_BITS}")
        if not 0 <= config.image_token_id < text.vocab_size:
            raise ModelError(
                f"the image token {config.image_token_id} is not among the decoder's {text.vocab_size} tokens; "
                "fix image_token_id (image_token_index in older files), or the size of the embeddings"
            )

    def info(self, config: Any, dtype: str, generation: Mapping[str, Any] | None = None) -> ModelInfo:
        """The facts that config.json tells, and ``generation``, the contents of generation_config.json."""
        text = config.text_config
        eos, pad = (
            # Idefics3 computes one of the whole config, with a default that other vocabularies lack.
            _first((generation or {}).get(name), vars(config).get(name), getattr(text, name, None))
            for name in ("eos_token_id", "pad_token_id")
        )
        # Some configs name tokens that the decoder lacks: they end nothing, and fill nothing up.
        eos_ids = _known(() if eos is None else (eos,) if isinstance(eos, int) else eos, text.vocab_size)
        pad_ids = _known(() if pad is None else (pad,), text.vocab_size)
        return ModelInfo(
            name=str(config.name_or_path),
            source=str(config.name_or_path),
            revision=None,
            architecture=self.architecture,
            dtype=dtype,
            layers=self.layers(config),
            query_heads=text.num_attention_heads,
            hidden_size=text.hidden_size,
            embed_width=text.hidden_size * (1 + self.deepstack(config)),
            vocab_size=text.vocab_size,
            max_positions=text.max_position_embeddings,
            position_rows=self.position_rows,
            image_token_id=config.image_token_id,
            tokens_per_picture=self.tokens_per_picture(config),
            typical_tokens=self.typical_tokens(config),
            pictures=describe(self.pictures(config)),
            prompt=self.prompt,
            eos_token_ids=eos_ids,
            pad_token_id=_first(*pad_ids, *eos_ids, 0),
        )

    def layers(self, config: Any) -> tuple[LayerInfo, ...]:
        """Attention of each decoder layer; those of a plain family are alike."""
        text = config.text_config
        layer = LayerInfo(
            kv_heads=text.num_key_value_heads,
            head_dim=head_dim(text),
            scale=float(getattr(text, "attention_multiplier", head_dim(text) ** -0.5)),  # Granite's, others have none
            rotary_dim=rotary_dim(text),
            rotary_interleaved=self.rotary_interleaved,
        )
        return (layer,) * text.num_hidden_layers

    @abstractmethod
    def pictures(self, config: Any) -> Kind:
        """How a picture becomes tokens."""

    def tokens_per_picture(self, config: Any) -> int | None:
        """Visual tokens of every picture; None where pictures vary in size."""
        return None

    @abstractmethod
    def typical_tokens(self, config: Any) -> tuple[int, ...]:
        """Visual tokens of usual pictures, ascending."""

    def limited_tokens(self, images: Any) -> tuple[int, ...]:
        """The same within the limits of an image processor, of pictures that are ``limited``."""
        raise NotImplementedError

    @abstractmethod
    def pixel_inputs(self, config: Any) -> tuple[TensorSpec, ...]:
        """Inputs of the vision graph, named as the image processor names them."""

    def deepstack(self, config: Any) -> int:
        """How many of the first decoder layers add features of the picture, which stand behind its embeddings."""
        return 0

    def text_model(self, model: Any) -> nn.Module:
        """The decoder without its head: takes ``inputs_embeds`` and ``position_ids``."""
        return model.model.language_model

    def vision_constants(self, model: Any) -> dict[str, Tensor]:
        """What :meth:`image_embeds` needs besides pixels and weights, computed once; given to it by name."""
        return {}

    @abstractmethod
    def image_embeds(self, model: Any, *pixel_inputs: Tensor, **constants: Tensor) -> Tensor:
        """Embeddings [tokens of all pictures, hidden] of the pictures in ``pixel_inputs``."""

    def attention_weights(self, model: Any, layer: int) -> AttentionWeights:
        """The weights around the attention of a decoder layer; Llama, Mistral, Qwen2 and Qwen3 name them alike."""
        layers: Any = self.text_model(model).layers
        block = layers[layer]
        attention = block.self_attn
        query_norm = getattr(attention, "q_norm", None)
        return AttentionWeights(
            attention.q_proj.weight,
            attention.q_proj.bias,
            block.input_layernorm.weight,
            attention.o_proj.weight,
            None if query_norm is None else query_norm.weight,
            self.norm_shift,
        )

    def linear_module(self, model: Any, layer: int) -> Any:
        """The module of a layer of linear attention that takes the place of the attention."""
        layers: Any = self.text_model(model).layers
        return layers[layer].linear_attn

    def rotary_embedding(self, model: Any) -> nn.Module:
        """The decoder's rotary embedding: from a tensor and positions [B, S] to cosine and sine [B, S, D]."""
        return self.text_model(model).rotary_emb  # type: ignore[return-value]

    def rotary_options(self, config: Any, layer: int) -> dict[str, Any]:
        """What the rotary embedding is to be told besides, to give the cosine and sine of this layer."""
        return {}

    def text_inputs(self, text_model: nn.Module, config: Any, input_ids: Tensor) -> dict[str, Tensor]:
        """What the decoder needs besides embeddings and positions, from the tokens [B, S]."""
        return {}

    def logits(self, config: Any, logits: Tensor) -> Tensor:
        """What the model makes of the head's output [B, V]."""
        return logits

    def model_class(self) -> Any:
        """The transformers class of the model."""
        import transformers

        return getattr(transformers, self.architecture)

    def head(self, model: Any) -> nn.Module:
        """The language model's head, from hidden states to logits."""
        return model.get_output_embeddings()

    @abstractmethod
    def prepare_processor(self, files: ProcessorFiles, config: Any) -> None:
        """Set what transformers' processor of the family sets by itself; ModelError if it does not fit the model."""

    def model_inputs(
        self, rows: Sequence[VisionCalls], sizes: Sequence[Sequence[tuple[int, int]]]
    ) -> dict[str, np.ndarray]:
        """Arguments of transformers' model for the pictures of a batch, from the calls of the vision graph of each row.

        ``sizes`` are height and width of each row's pictures, before they were resized. There is at least one picture.
        """
        return {"pixel_values": np.concatenate([call["pixel_values"] for row in rows for call in row])}


def head_dim(text: Any) -> int:
    """Elements of a head of a text config."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def rotary_dim(text: Any) -> int:
    """Channels that the rotary embedding of a text config turns; 0 stands for all."""
    share = (getattr(text, "rope_parameters", None) or {}).get("partial_rotary_factor") or 1.0
    return 0 if share == 1.0 else int(head_dim(text) * share)


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """Logits bounded by a soft cap; as they are without one."""
    return logits if cap is None else (logits / cap).tanh() * cap


def one_of(names: Any) -> str:
    """``a, b or c``."""
    *rest, last = names
    return f"{', '.join(rest)} or {last}" if rest else str(last)


def square_pixels(vision: Any, size: int) -> tuple[TensorSpec, ...]:
    """``pixel_values`` [P, channels, size, size] for P pictures or tiles."""
    return (TensorSpec("pixel_values", "float32", ("P", getattr(vision, "num_channels", 3), size, size)),)


def filled(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays of one rank in one, with zeros behind each up to the largest size on every axis."""
    sizes = np.max([array.shape for array in arrays], axis=0)
    return np.stack([np.pad(array, [(0, most) for most in sizes - array.shape]) for array in arrays])


def check_image_size(given: Mapping[str, int], size: int, file: str) -> None:
    """Raise ModelError unless pictures that the image processor makes have this many pixels on each side.

    ``file`` holds its settings.
    """
    found = {given.get("height", given.get("longest_edge", given.get("shortest_edge")))}
    found.add(given.get("width", *found))
    if found != {size}:
        raise ModelError(
            f"the image processor gives pictures of {sorted(found, key=str)} pixels, the vision tower takes {size}; "
            f"fix {file}"
        )


def _quantization_method(config: Any) -> str | None:
    """How weights are quantised, None if they are not. A config file gives a mapping, a loaded model an object."""
    given = getattr(config, "quantization_config", None)
    if not given:
        return None
    method = given.get("quant_method") if isinstance(given, Mapping) else getattr(given, "quant_method", None)
    name = str(getattr(method, "value", method or "by an unnamed method"))
    return QUANTISED.get(name, name)


def _known(tokens: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """Those of some tokens that a vocabulary has."""
    return tuple(token for token in tokens if 0 <= token < vocab_size)


def _first(*candidates: Any) -> Any:
    return next((candidate for candidate in candidates if candidate is not None), None)
