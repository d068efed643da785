"""Qwen2-VL and Qwen2.5-VL: pictures of any size, a rotary embedding of time, rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vkvx.errors import ModelError
from vkvx.manifest import TensorSpec
from vkvx.models.family import Family, VisionCalls
from vkvx.models.pictures.grid import Grid
from vkvx.models.processor_files import ProcessorFiles

if TYPE_CHECKING:
    from torch import Tensor

VIDEO_MARK = "<|video_pad|>"
USUAL_SIZES = ((480, 640), (960, 1280), (1080, 1920))
"""Height and width in pixels of usual pictures."""


class GridFamily(Family):
    """What families have in common whose pictures are grids of patches, of which some make a visual token."""

    packed_vision = True
    position_rows = 4

    def pictures(self, config: Any) -> Grid:
        """As many patches make a token as the tower merges."""
        return Grid(config.vision_config.spatial_merge_size)

    def typical_tokens(self, config: Any) -> tuple[int, ...]:
        """Of pictures of ``USUAL_SIZES``, as long as nobody limits their pixels."""
        side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
        return tuple(max(1, round(height / side)) * max(1, round(width / side)) for height, width in USUAL_SIZES)

    def limited_tokens(self, images: Any) -> tuple[int, ...]:
        """As many as the image processor says of ``USUAL_SIZES``."""
        unit = images.merge_size**2
        return tuple(sorted(images.get_number_of_image_patches(*size) // unit for size in USUAL_SIZES))

    def pixel_inputs(self, config: Any) -> tuple[TensorSpec, ...]:
        """Patches ``pixel_values`` [merge² M, ...], and the geometry of the picture that :class:`Grid` tells."""
        pictures = self.pictures(config)
        pixels = TensorSpec("pixel_values", "float32", (pictures.pixel_rows, *self.patch_shape(config.vision_config)))
        return (pixels, *pictures.inputs())

    def patch_shape(self, vision: Any) -> tuple[int, ...]:
        """A patch as the image processor gives it: all pixels and frames in a row."""
        return (getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2,)

    def prepare_processor(self, files: ProcessorFiles, config: Any) -> None:
        """Patches of the image processor must be those of the tower."""
        vision, images = config.vision_config, files.images
        given = (images.patch_size, images.merge_size)
        if given != (vision.patch_size, vision.spatial_merge_size):
            raise ModelError(
                f"the image processor makes patches of {given[0]} pixels and merges {given[1]}, the vision tower takes "
                f"{vision.patch_size} and {vision.spatial_merge_size}; fix {files.image_file}"
            )

    def model_inputs(
        self, rows: Sequence[VisionCalls], sizes: Sequence[Sequence[tuple[int, int]]]
    ) -> dict[str, np.ndarray]:
        """``pixel_values`` of all pictures one after another, and ``image_grid_thw`` [P, 3]."""
        sizes = [call["position_ids"].max(0) + 1 for row in rows for call in row]
        grids = np.array([[1, *size] for size in sizes], np.int64)
        return {**super().model_inputs(rows, sizes), "image_grid_thw": grids}


class Qwen2VL(GridFamily):
    """``Qwen2VLForConditionalGeneration``."""

    title = "Qwen2-VL"
    aliases = {f"qwen2-vl-{size}b": f"Qwen/Qwen2-VL-{size}B-Instruct" for size in (2, 7)}
    architecture = "Qwen2VLForConditionalGeneration"
    text_models = tested_models = ("qwen2_vl_text",)

    def pictures(self, config: Any) -> Grid:
        """Frames of a video are one position apart."""
        return Grid(config.vision_config.spatial_merge_size, video_mark=VIDEO_MARK)

    def image_embeds(self, model: Any, *pixel_inputs: Tensor, **constants: Tensor) -> Tensor:
        """The tower merges patches itself."""
        from vkvx.models.graph.vision import Whole

        pixels, positions = pixel_inputs
        return model.model.visual(pixels, None, cu_seqlens=Whole(), max_seqlen=1, position_ids=positions).pooler_output


class Qwen25VL(GridFamily):
    """``Qwen2_5_VLForConditionalGeneration``: most layers of the tower attend within windows."""

    title = "Qwen2.5-VL"
    aliases = {f"qwen2.5-vl-{size}b": f"Qwen/Qwen2.5-VL-{size}B-Instruct" for size in (3, 7, 32)}
    architecture = "Qwen2_5_VLForConditionalGeneration"
    text_models = tested_models = ("qwen2_5_vl_text",)

    def pictures(self, config: Any) -> Grid:
        """The side of a window counts tokens. Frames of a video are as many positions apart as their time says."""
        vision = config.vision_config
        window = vision.window_size // vision.patch_size // vision.spatial_merge_size
        return Grid(vision.spatial_merge_size, window, pace=vision.tokens_per_second, video_mark=VIDEO_MARK)

    def patch_shape(self, vision: Any) -> tuple[int, ...]:
        """Its config calls the channels by another name than Qwen2-VL's."""
        return (vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,)

    def image_embeds(self, model: Any, *pixel_inputs: Tensor, **constants: Tensor) -> Tensor:
        """The tower orders tokens by windows, and back at its end."""
        from vkvx.models.graph.vision import Whole, Windows

        pixels, positions, index, patches, place = pixel_inputs
        return model.model.visual(
            pixels,
            None,
            cu_seqlens=Whole(),
            max_seqlen=1,
            cu_window_seqlens=Windows(patches, place),
            max_window_seqlen=1,
            window_index=index.long(),  # which becomes a GatherND, and that takes no INT32
            position_ids=positions,
        ).pooler_output
