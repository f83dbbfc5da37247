"""Tiers and templates: what is filled in, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.workflows import DEFAULT_TIERS, Workflows, build, find_tier, tier_of_effort
from rung.errors import InvalidRequestError
from rung.types import FILE_PREFIX, ImageInput, ImagePart, ReclaimGrade

GIB = 1024**3
LIGHTNING, QUALITY, ULTRA = (DEFAULT_TIERS[name] for name in ("lightning", "quality", "ultra"))
#: Heads of pictures: PNG with and without an alpha channel, WebP with one.
ALPHA = b"\x89PNG\r\n\x1a\n" + bytes(17) + b"\x06" + bytes(10)
OPAQUE = b"\x89PNG\r\n\x1a\n" + bytes(17) + b"\x02" + bytes(10)
WEBP_ALPHA = b"RIFF\x00\x00\x00\x00WEBPVP8X\x0a\x00\x00\x00\x10" + bytes(10)


def picture(data: bytes = OPAQUE, content_type: str = "image/png") -> ImagePart:
    return ImagePart(content_type=content_type, data=data)


def graph_of(
    operation: str = "generate", tier: Any = QUALITY, seed: int = 7, **wanted: Any
) -> dict[str, dict[str, Any]]:
    """Inputs by class of a built graph: of its nodes with distinct classes."""
    asked = ImageInput(**({"prompt": "a cat", "operation": operation} | wanted))
    graph = json.loads(build(Workflows().get(operation), asked, tier, seed).graph_json)
    return {node["class_type"]: node["inputs"] for node in graph.values()}


def refused(operation: str = "generate", tier: Any = QUALITY, **wanted: Any) -> str:
    with pytest.raises(InvalidRequestError) as error:
        graph_of(operation, tier, **wanted)
    return error.value.message


class TestTiers:
    def test_those_of_a_32_gb_card(self) -> None:
        found = {
            tier.name: (tier.checkpoint, tier.family, tier.steps, tier.vram_bytes / 10**9, tier.grade)
            for tier in DEFAULT_TIERS.values()
        }
        assert found == {
            "lightning": ("sdxl_lightning_4step.safetensors", "sdxl", 4, 6, ReclaimGrade.QUICK),
            "quality": ("waiIllustriousSDXL_v140.safetensors", "sdxl", 28, 12, ReclaimGrade.STANDARD),
            "ultra": ("flux1-dev-fp8.safetensors", "flux", 40, 20, ReclaimGrade.FULL),
        }

    def test_effort_chooses_one(self) -> None:
        assert [tier_of_effort(effort) for effort in range(1, 11)] == (
            ["lightning"] * 3 + ["quality"] * 4 + ["ultra"] * 3
        )

    def test_an_operation_may_take_another_model(self) -> None:
        video = ULTRA.of("video")
        assert (video.family, video.width_pixels, video.name) == ("ltx", 768, "ultra")
        assert ULTRA.of("upscale").checkpoint == ""
        # What the operation says nothing of is the tier's.
        assert ULTRA.of("generate") == replace(ULTRA, operations={})
        assert video.of("video") == video

    def test_an_unknown_one_is_named_with_those_there_are(self) -> None:
        with pytest.raises(
            InvalidRequestError, match="no tier 'turbo'; tiers are: lightning, quality, ultra"
        ):
            find_tier(DEFAULT_TIERS, "turbo")


class TestBuilding:
    def test_the_tier_fills_in_what_the_wish_leaves_open(self) -> None:
        found = graph_of(tier=LIGHTNING, seed=99)
        assert found["KSampler"] == {
            "model": ["4", 0],
            "seed": 99,
            "steps": 4,
            "cfg": 1.0,
            "sampler_name": "euler",
            "scheduler": "sgm_uniform",
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
            "denoise": 1.0,
        }
        assert found["CheckpointLoaderSimple"] == {"ckpt_name": "sdxl_lightning_4step.safetensors"}
        assert found["EmptyLatentImage"] == {"width": 1024, "height": 1024, "batch_size": 1}

    def test_the_wish_comes_first(self) -> None:
        found = graph_of(
            width_pixels=832,
            height_pixels=1216,
            count=4,
            parameters={"steps": 12.0, "cfg": 5, "sampler": "ddim"},
        )
        sampling = found["KSampler"]
        assert (sampling["steps"], sampling["cfg"], sampling["sampler_name"]) == (12, 5, "ddim")
        assert type(sampling["steps"]) is int
        assert sampling["scheduler"] == "karras"
        assert found["EmptyLatentImage"] == {"width": 832, "height": 1216, "batch_size": 4}

    def test_flux_has_guidance_and_no_negative_prompt(self) -> None:
        found = graph_of(tier=ULTRA, negative_prompt="dogs", parameters={"guidance": 2.5})
        assert found["FluxGuidance"] == {"conditioning": ["6", 0], "guidance": 2.5}
        assert found["KSampler"]["positive"] == ["10", 0]
        assert found["ConditioningZeroOut"] == {"conditioning": ["6", 0]}
        assert "EmptySD3LatentImage" in found
        assert "dogs" not in json.dumps(found)

    def test_loras_stand_between_the_model_and_what_uses_it(self) -> None:
        asked = ImageInput(
            prompt="a cat", parameters={"loras": [{"name": "a.st", "strength": 0.5}, {"name": "b.st"}]}
        )
        graph = json.loads(build(Workflows().get("generate"), asked, QUALITY, 1).graph_json)
        assert graph["4_lora_0"]["inputs"] == {
            "model": ["4", 0],
            "clip": ["4", 1],
            "lora_name": "a.st",
            "strength_model": 0.5,
            "strength_clip": 0.5,
        }
        assert graph["4_lora_1"]["inputs"]["model"] == ["4_lora_0", 0]
        assert graph["3"]["inputs"]["model"] == ["4_lora_1", 0]
        assert graph["6"]["inputs"]["clip"] == graph["7"]["inputs"]["clip"] == ["4_lora_1", 1]
        # A VAE has no LoRA.
        assert graph["8"]["inputs"]["vae"] == ["4", 2]

    def test_a_prompt_is_never_looked_into(self) -> None:
        asked = ImageInput(prompt="{{seed}} of {{checkpoint}}")
        graph = json.loads(build(Workflows().get("generate"), asked, QUALITY, 1).graph_json)
        assert graph["6"]["inputs"]["text"] == "{{seed}} of {{checkpoint}}"

    def test_a_prompt_is_never_taken_for_a_file(self) -> None:
        asked = ImageInput(prompt=f"{FILE_PREFIX}image.png")
        graph = json.loads(build(Workflows().get("generate"), asked, QUALITY, 1).graph_json)
        assert graph["6"]["inputs"]["text"] == f" {FILE_PREFIX}image.png"

    def test_building_changes_no_template(self) -> None:
        before = Workflows().get("generate")
        text = repr(before)
        graph_of(tier=ULTRA, parameters={"loras": [{"name": "a.st"}]})
        assert repr(Workflows().get("generate")) == text

    def test_previews_are_passed_on(self) -> None:
        asked = ImageInput(prompt="a cat", previews=True)
        assert build(Workflows().get("generate"), asked, QUALITY, 1).previews

    def test_a_given_size_crops_a_picture_and_none_keeps_its_proportions(self) -> None:
        kept = graph_of("img2img", images=(picture(),))
        assert kept["ImageScaleToTotalPixels"]["megapixels"] == 1.0
        assert (kept["ImageScale"]["width"], kept["ImageScale"]["height"]) == (0, 0)
        cropped = graph_of("img2img", images=(picture(),), width_pixels=512, height_pixels=512)
        assert cropped["ImageScaleToTotalPixels"]["megapixels"] == 0.25
        assert (cropped["ImageScale"]["width"], cropped["ImageScale"]["height"]) == (512, 512)

    def test_scale_means_the_same_with_a_model_and_without(self) -> None:
        with_model = graph_of("upscale", images=(picture(),), parameters={"scale": 2})
        assert with_model["UpscaleModelLoader"] == {"model_name": "RealESRGAN_x4plus.pth"}
        assert with_model["ImageScaleBy"]["scale_by"] == 0.5
        without = graph_of("upscale", images=(picture(),), parameters={"scale": 2, "upscale_model": ""})
        assert "UpscaleModelLoader" not in without
        assert without["ImageScaleBy"] == {"image": ["11", 0], "upscale_method": "lanczos", "scale_by": 2}

    def test_video_starts_from_a_picture_where_there_is_one(self) -> None:
        assert "LTXVImgToVideo" not in graph_of("video")
        found = graph_of("video", images=(picture(),))
        assert found["LTXVImgToVideo"]["image"] == ["11", 0]
        assert found["SamplerCustom"]["latent_image"] == ["5", 2]

    def test_edges_are_found_first_if_asked_for(self) -> None:
        assert "Canny" not in graph_of("controlnet", images=(picture(),))
        found = graph_of("controlnet", images=(picture(),), parameters={"edges": True})
        assert found["ControlNetApplyAdvanced"]["image"] == ["22", 0]


class TestMasks:
    @pytest.mark.parametrize(
        ("mask", "content_type", "channel"),
        [
            (ALPHA, "image/png", "alpha"),
            (WEBP_ALPHA, "image/webp", "alpha"),
            (OPAQUE, "image/png", "red"),
            (b"\xff\xd8\xff", "image/jpeg", "red"),
            (OPAQUE + b"tRNS", "image/png", "alpha"),
        ],
    )
    def test_are_transparency_or_white(self, mask: bytes, content_type: str, channel: str) -> None:
        found = graph_of("inpaint", images=(picture(), picture(mask, content_type)))
        assert found["LoadImageMask"]["channel"] == channel

    def test_a_transparent_picture_is_its_own_mask(self) -> None:
        asked = ImageInput(prompt="a cat", operation="inpaint", images=(picture(ALPHA),))
        built = build(Workflows().get("inpaint"), asked, QUALITY, 1)
        assert [(file.name, file.data) for file in built.files] == [("image.png", ALPHA), ("mask.png", ALPHA)]

    def test_an_opaque_picture_is_not(self) -> None:
        assert refused("inpaint", images=(picture(),)) == (
            "images lacks the mask: inpaint starts from image and mask, or a picture that is transparent "
            "where to draw"
        )


class TestRefusals:
    @pytest.mark.parametrize(
        ("parameters", "words"),
        [
            (
                {"step": 4},
                "generate has no parameter 'step'; did you mean steps? It takes cfg, guidance, loras,",
            ),
            ({"checkpoint": "evil.ckpt"}, "generate has no parameter 'checkpoint'. It takes"),
            ({"steps": 0}, "steps is 0; it must be an integer from 1 up to 150"),
            ({"steps": 4.5}, "steps is 4.5; it must be an integer"),
            ({"steps": True}, "steps is True; it must be an integer"),
            ({"steps": "4"}, "steps is '4'; it must be an integer"),
            ({"cfg": 31}, "cfg is 31; it must be a number from 0 up to 30"),
            ({"cfg": True}, "cfg is True; it must be a number"),
            ({"cfg": float("nan")}, "cfg is nan; it must be a number"),
            ({"sampler": 4}, "sampler is 4; it must be a text"),
            ({"loras": "a.st"}, "loras is 'a.st'; it must be a list of up to 8"),
            (
                {"loras": [{"name": "a.st", "weight": 1}]},
                "loras is {'name': 'a.st', 'weight': 1}; it must be",
            ),
            ({"loras": [{"name": "a.st", "strength": 11}]}, "strength of a.st is 11; it must be -10 to 10"),
            ({"loras": [{"name": "a.st"}] * 9}, "it must be a list of up to 8"),
        ],
    )
    def test_parameters(self, parameters: dict[str, Any], words: str) -> None:
        assert words in refused(parameters=parameters)

    def test_a_parameter_that_is_null_is_not_given(self) -> None:
        assert graph_of(parameters={"steps": None})["KSampler"]["steps"] == 28

    @pytest.mark.parametrize(
        ("wanted", "words"),
        [
            ({"prompt": "  "}, "prompt is empty; generate needs one"),
            ({"width_pixels": 1001}, "width_pixels is 1001; it must be a multiple of 8 from 64 to 4096"),
            ({"height_pixels": 56}, "height_pixels is 56; it must be a multiple of 8"),
            ({"width_pixels": 4104}, "width_pixels is 4104"),
            ({"width_pixels": -8}, "width_pixels is -8"),
            ({"count": 9}, "count is 9; it must be 1 to 8"),
            ({"count": 0}, "count is 0; it must be 1 to 8"),
            ({"seed": -1}, "seed is -1"),
            ({"images": (picture(),)}, "images has 1; generate takes none"),
        ],
    )
    def test_what_is_wanted(self, wanted: dict[str, Any], words: str) -> None:
        assert words in refused(**wanted)

    @pytest.mark.parametrize(
        ("operation", "wanted", "words"),
        [
            ("img2img", {}, "images lacks the image: img2img starts from image"),
            ("img2img", {"images": (picture(b""),)}, "images[0] is empty"),
            (
                "img2img",
                {"images": (picture(b"x", "text/html"),)},
                "images[0] is 'text/html'; it must be a picture",
            ),
            ("img2img", {"images": (picture(), picture())}, "images has 2; img2img takes image"),
            ("outpaint", {"images": (picture(),)}, "outpaint needs at least one of left, top, right, bottom"),
            (
                "outpaint",
                {"images": (picture(),), "parameters": {"left": 12}},
                "left is 12; it must be an integer from 0 up to 1024, a multiple of 8",
            ),
            ("upscale", {"images": (picture(),), "count": 2}, "count is 2; upscale makes one at a time"),
            (
                "controlnet",
                {"images": (picture(),), "parameters": {"edges": 1}},
                "edges is 1; it must be true or",
            ),
            ("video", {"width_pixels": 1000}, "width_pixels is 1000; it must be a multiple of 32"),
        ],
    )
    def test_what_an_operation_needs(self, operation: str, wanted: dict[str, Any], words: str) -> None:
        assert words in refused(operation, **wanted)

    def test_a_model_of_a_family_that_the_operation_is_not_for(self) -> None:
        flux = replace(ULTRA, operations={})
        assert refused("animate", flux).startswith(
            "animate is for models of the family sdxl or sd15; tier ultra has one of flux: choose"
        )

    def test_a_file_that_the_tier_lacks(self) -> None:
        bare = replace(QUALITY, models={})
        message = refused("controlnet", bare, images=(picture(),))
        assert message.startswith(
            "controlnet has no value: controlnet needs it from the request, or from images."
        )

    def test_an_operation_that_is_not_there(self) -> None:
        with pytest.raises(InvalidRequestError, match="no operation 'inpant'; did you mean inpaint"):
            Workflows().get("inpant")
