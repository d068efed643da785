"""Saves the decoder inputs of a prompt with pictures, as the C++ example reads them. The vision tower runs on the CPU.

python examples/save_inputs.py BUNDLE OUT.npz --prompt "USER: <image>\\nWhat is this? ASSISTANT:" --image page.png
"""

from __future__ import annotations

import argparse

import numpy as np

from vkvx import Session
from vkvx.runtime.calls import build_call, place_embeds


def main() -> None:
    """Parse the arguments, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="a bundle of `vkvx export`")
    parser.add_argument("output", help="the .npz file to write")
    parser.add_argument("--prompt", required=True, help="with one <image> for each picture")
    parser.add_argument("--image", action="append", default=[], help="a picture; may be given several times")
    args = parser.parse_args()
    with Session.load(args.bundle, provider="cpu") as session:
        manifest = session.manifest
        prepared = session.processor.prepare(args.prompt, args.image)
        call = build_call(
            [session.backend.cache.row(0, prepared.token_ids, prepared.picture_lengths, prepared.positions)],
            group_size=manifest.quantization.group_size,
            image_token_id=manifest.model.image_token_id,
        )
        rows, entries = call.visual_index.shape
        hidden = next(t.shape[-1] for t in manifest.graphs["decoder"].inputs if t.name == "visual_embeds")
        embeds = np.zeros((rows, entries, int(hidden)), np.float32)
        if prepared.vision_calls:
            pieces = [session.backend.encode(inputs).astype(np.float32) for inputs in prepared.vision_calls]
            embeds = place_embeds(call, np.concatenate(pieces))
    names = ("input_ids", "position_ids", "visual_index", "text_index", "last_index", "slot")
    np.savez(args.output, visual_embeds=embeds, **{name: getattr(call, name) for name in names})


if __name__ == "__main__":
    main()
