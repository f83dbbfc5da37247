"""Write a small checkpoint of random weights, which ComfyUI takes for one of Stable Diffusion 1.5.

Run by ComfyUI's own Python in its checkout. ComfyUI recognises a model by the shapes of its weights: this has
one level of the UNet's four, and a small VAE; the text encoder is of the usual size.
"""

from __future__ import annotations

import os
from pathlib import Path

# ComfyUI's own; this file is run where there is one.
import comfy.options

comfy.options.enable_args_parsing()

import comfy.ops  # noqa: E402 - it reads the arguments
import comfy.sd1_clip  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from comfy.taesd.taesd import TAESD  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [1],
    "channel_mult": (1,),
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
    "transformer_depth_middle": 1,
    "num_heads": 8,
    "context_dim": 768,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
    "use_checkpoint": False,
    "dtype": torch.float16,
    "operations": comfy.ops.disable_weight_init,
}


def main() -> None:
    """Write it."""
    random = torch.Generator().manual_seed(0)
    text_model = comfy.sd1_clip.SDClipModel(device="cpu", dtype=torch.float16).state_dict()
    parts = {
        "model.diffusion_model.": UNetModel(**_UNET).state_dict(),
        "cond_stage_model.": {
            name: value for name, value in text_model.items() if name.startswith("transformer.text_model.")
        },
        "first_stage_model.": TAESD().state_dict(),
    }
    weights = {}
    for prefix, part in parts.items():
        for name, value in part.items():
            if value.is_floating_point():
                filled = torch.randn(value.shape, generator=random) * 0.02
                weights[prefix + name] = filled.to(torch.float16).contiguous()
            else:
                weights[prefix + name] = value.contiguous()
    target = Path(os.environ["TINY_CHECKPOINT"])
    save_file(weights, target.with_suffix(".part"))
    target.with_suffix(".part").rename(target)


main()
