"""The classes of nodes that a simulated ComfyUI has: those of ComfyUI's own that pictures are made with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

_SAMPLERS = ("euler", "euler_ancestral", "dpmpp_2m", "dpmpp_sde", "ddim", "uni_pc")
_SCHEDULERS = ("simple", "sgm_uniform", "karras", "normal", "beta")
#: A class a paragraph: its inputs with types, bounds and choices, and after the arrow what it gives. `?`
#: marks what may be left out, `!` a class whose nodes are outputs, `@` a list that is not always the same.
_TABLE = """
BasicScheduler: model:MODEL scheduler:@schedulers steps:INT(1..10000) denoise:FLOAT(0..1) -> SIGMAS
CLIPLoader: clip_name:@models
  type:[stable_diffusion|stable_cascade|sd3|stable_audio|mochi|ltxv|pixart|cosmos|lumina2|wan|hidream|chroma|ace|omnigen2|qwen_image|hunyuan_image]
  device?:[default|cpu] -> CLIP
CLIPTextEncode: text:STRING clip:CLIP -> CONDITIONING
Canny: image:IMAGE low_threshold:FLOAT(0.01..0.99) high_threshold:FLOAT(0.01..0.99) -> IMAGE
CheckpointLoaderSimple: ckpt_name:@checkpoints -> MODEL CLIP VAE
ConditioningZeroOut: conditioning:CONDITIONING -> CONDITIONING
ControlNetApplyAdvanced: positive:CONDITIONING negative:CONDITIONING control_net:CONTROL_NET image:IMAGE
  strength:FLOAT(0..10) start_percent:FLOAT(0..1) end_percent:FLOAT(0..1) vae?:VAE -> CONDITIONING
  CONDITIONING
ControlNetLoader: control_net_name:@models -> CONTROL_NET
DualCLIPLoader: clip_name1:@models clip_name2:@models
  type:[sdxl|sd3|flux|hunyuan_video|hidream|hunyuan_image] device?:[default|cpu] -> CLIP
EmptyImage: width:INT(1..16384) height:INT(1..16384) batch_size:INT(1..4096) color:INT(0..16777215) -> IMAGE
EmptyLTXVLatentVideo: width:INT(64..16384) height:INT(64..16384) length:INT(1..16384)
  batch_size:INT(1..4096) -> LATENT
EmptyLatentImage: width:INT(16..16384) height:INT(16..16384) batch_size:INT(1..4096) -> LATENT
EmptySD3LatentImage: width:INT(16..16384) height:INT(16..16384) batch_size:INT(1..4096) -> LATENT
FluxGuidance: conditioning:CONDITIONING guidance:FLOAT(0..100) -> CONDITIONING
GrowMask: mask:MASK expand:INT(-16384..16384) tapered_corners:BOOLEAN -> MASK
ImageCompositeMasked: destination:IMAGE source:IMAGE x:INT(0..16384) y:INT(0..16384) resize_source:BOOLEAN
  mask?:MASK -> IMAGE
ImageInvert: image:IMAGE -> IMAGE
ImagePadForOutpaint: image:IMAGE left:INT(0..16384) top:INT(0..16384) right:INT(0..16384)
  bottom:INT(0..16384) feathering:INT(0..16384) -> IMAGE MASK
ImageScale: image:IMAGE upscale_method:[nearest-exact|bilinear|area|bicubic|lanczos] width:INT(0..16384)
  height:INT(0..16384) crop:[disabled|center] -> IMAGE
ImageScaleBy: image:IMAGE upscale_method:[nearest-exact|bilinear|area|bicubic|lanczos]
  scale_by:FLOAT(0.01..8) -> IMAGE
ImageScaleToTotalPixels: image:IMAGE upscale_method:[nearest-exact|bilinear|area|bicubic|lanczos]
  megapixels:FLOAT(0.01..16) -> IMAGE
ImageToMask: image:IMAGE channel:[red|green|blue|alpha] -> MASK
ImageUpscaleWithModel: upscale_model:UPSCALE_MODEL image:IMAGE -> IMAGE
KSampler: model:MODEL seed:INT(0..18446744073709551615) steps:INT(1..10000) cfg:FLOAT(0..100)
  sampler_name:@samplers scheduler:@schedulers positive:CONDITIONING negative:CONDITIONING
  latent_image:LATENT denoise:FLOAT(0..1) -> LATENT
KSamplerAdvanced: model:MODEL add_noise:[enable|disable] noise_seed:INT(0..18446744073709551615)
  steps:INT(1..10000) cfg:FLOAT(0..100) sampler_name:@samplers scheduler:@schedulers positive:CONDITIONING
  negative:CONDITIONING latent_image:LATENT start_at_step:INT(0..10000) end_at_step:INT(0..10000)
  return_with_leftover_noise:[disable|enable] -> LATENT
KSamplerSelect: sampler_name:@samplers -> SAMPLER
LTXVConditioning: positive:CONDITIONING negative:CONDITIONING frame_rate:FLOAT(0..1000) -> CONDITIONING
  CONDITIONING
LTXVImgToVideo: positive:CONDITIONING negative:CONDITIONING vae:VAE image:IMAGE width:INT(64..16384)
  height:INT(64..16384) length:INT(9..16384) batch_size:INT(1..4096) strength:FLOAT(0..1) -> CONDITIONING
  CONDITIONING LATENT
LTXVScheduler: steps:INT(1..10000) max_shift:FLOAT(0..100) base_shift:FLOAT(0..100) stretch:BOOLEAN
  terminal:FLOAT(0..0.99) latent?:LATENT -> SIGMAS
LatentUpscaleBy: samples:LATENT upscale_method:[nearest-exact|bilinear|area|bicubic|bislerp]
  scale_by:FLOAT(0.01..8) -> LATENT
LoadImage: image:@input -> IMAGE MASK
LoadImageMask: image:@input channel:[alpha|red|green|blue] -> MASK
LoraLoader: model:MODEL clip:CLIP lora_name:@models strength_model:FLOAT(-100..100)
  strength_clip:FLOAT(-100..100) -> MODEL CLIP
MaskToImage: mask:MASK -> IMAGE
!PreviewImage: images:IMAGE ->
RepeatImageBatch: image:IMAGE amount:INT(1..4096) -> IMAGE
RepeatLatentBatch: samples:LATENT amount:INT(1..64) -> LATENT
SamplerCustom: model:MODEL add_noise:BOOLEAN noise_seed:INT(0..18446744073709551615) cfg:FLOAT(0..100)
  positive:CONDITIONING negative:CONDITIONING sampler:SAMPLER sigmas:SIGMAS latent_image:LATENT -> LATENT
  LATENT
!SaveAnimatedWEBP: images:IMAGE filename_prefix:STRING fps:FLOAT(0.01..1000) lossless:BOOLEAN
  quality:INT(0..100) method:[default|fastest|slowest] ->
!SaveImage: images:IMAGE filename_prefix:STRING ->
!SaveWEBM: images:IMAGE filename_prefix:STRING codec:[vp9|av1] fps:FLOAT(0.01..1000) crf:FLOAT(0..63) ->
SetLatentNoiseMask: samples:LATENT mask:MASK -> LATENT
UNETLoader: unet_name:@models weight_dtype:[default|fp8_e4m3fn|fp8_e4m3fn_fast|fp8_e5m2] -> MODEL
UpscaleModelLoader: model_name:@models -> UPSCALE_MODEL
VAEDecode: samples:LATENT vae:VAE -> IMAGE
VAEEncode: pixels:IMAGE vae:VAE -> LATENT
VAEEncodeForInpaint: pixels:IMAGE vae:VAE mask:MASK grow_mask_by:INT(0..64) -> LATENT
VAELoader: vae_name:@models -> VAE
"""
_NUMBER = re.compile(r"(INT|FLOAT)\(([^.]*(?:\.\d+)?)\.\.(.*)\)")


class Link(Struct, frozen=True):
    """An input that another node gives."""

    type: str


class Number(Struct, frozen=True):
    """An input that is a number."""

    type: str
    minimum: float
    maximum: float


class Plain(Struct, frozen=True):
    """An input that is any text, or true or false."""

    type: str


class Choice(Struct, frozen=True):
    """An input that is one of a list; an uploaded file may be in none."""

    values: tuple[str, ...]
    uploaded: bool = False


class NodeKind(Struct, frozen=True):
    """A class of nodes: what it takes, and the types that it gives."""

    inputs: dict[str, Link | Number | Plain | Choice]
    optional: frozenset[str]
    outputs: tuple[str, ...]
    is_output: bool

    def told(self, name: str) -> dict[str, Any]:
        """As `/object_info` has it."""
        rows: dict[str, dict[str, Any]] = {"required": {}, "optional": {}}
        for each, wanted in self.inputs.items():
            rows["optional" if each in self.optional else "required"][each] = _row(wanted)
        return {
            "input": {group: row for group, row in rows.items() if row},
            "output": list(self.outputs),
            "output_name": list(self.outputs),
            "name": name,
            "display_name": name,
            "output_node": self.is_output,
        }


def node_kinds(checkpoints: tuple[str, ...], models: tuple[str, ...] = ()) -> dict[str, NodeKind]:
    """The classes by their names. `models` are those of every folder but that of checkpoints."""
    lists = {
        "@checkpoints": Choice(checkpoints),
        "@models": Choice(models),
        "@samplers": Choice(_SAMPLERS),
        "@schedulers": Choice(_SCHEDULERS),
        "@input": Choice((), uploaded=True),
    }
    found = {}
    for paragraph in _TABLE.strip().replace("\n  ", " ").splitlines():
        name, _, rest = paragraph.partition(":")
        inputs, _, outputs = rest.partition("->")
        pairs = [token.split(":", 1) for token in inputs.split()]
        found[name.removeprefix("!")] = NodeKind(
            {each.removesuffix("?"): _input(told, lists) for each, told in pairs},
            frozenset(each.removesuffix("?") for each, _ in pairs if each.endswith("?")),
            tuple(outputs.split()),
            name.startswith("!"),
        )
    return found


def _input(told: str, lists: Mapping[str, Choice]) -> Link | Number | Plain | Choice:
    number = _NUMBER.fullmatch(told)
    if number is not None:
        kind, low, high = number.groups()
        read = int if kind == "INT" else float
        return Number(kind, read(low), read(high))
    if told.startswith("["):
        return Choice(tuple(told[1:-1].split("|")))
    if told in ("STRING", "BOOLEAN"):
        return Plain(told)
    return lists[told] if told.startswith("@") else Link(told)


def _row(wanted: Link | Number | Plain | Choice) -> list[Any]:
    match wanted:
        case Number(type=kind, minimum=minimum, maximum=maximum):
            return [kind, {"min": minimum, "max": maximum}]
        case Choice(values=values, uploaded=uploaded):
            return [list(values), {"image_upload": True} if uploaded else {}]
        case Link(type=kind) | Plain(type=kind):
            return [kind, {}]
