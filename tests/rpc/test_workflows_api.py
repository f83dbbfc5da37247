"""Workflow templates over gRPC and HTTP."""

from __future__ import annotations

from rung import codec, v1
from tests.fakes.api_server import an_api_server
from tests.fakes.gateway import a_plane


async def test_list_workflows_has_the_built_in_ones_with_their_parameters() -> None:
    async with an_api_server() as plane:
        response = await v1.InferenceServiceStub(plane.channel).ListWorkflows(v1.ListWorkflowsRequest())
    workflows = {each.name: codec.workflow_from_proto(each) for each in response.workflows}
    assert list(workflows) == [
        "animate",
        "controlnet",
        "generate",
        "img2img",
        "inpaint",
        "outpaint",
        "upscale",
        "video",
    ]
    assert workflows["inpaint"].images == ("image", "mask")
    assert workflows["video"].images == ("image?",)
    assert workflows["video"].video
    steps = next(each for each in workflows["generate"].parameters if each.name == "steps")
    assert (steps.type, steps.minimum, steps.maximum, steps.default_json) == ("integer", 1, 150, "null")


async def test_the_gateway_lists_workflows_with_defaults_as_json() -> None:
    async with a_plane() as plane, plane.http.get(f"{plane.url}/v1/workflows") as response:
        body = await response.json()
    assert response.status == 200
    assert body["object"] == "list"
    upscale = next(each for each in body["data"] if each["name"] == "upscale")
    assert upscale["images"] == ["image"]
    scale = next(each for each in upscale["parameters"] if each["name"] == "scale")
    assert scale["default"] == 2.0
    assert scale["minimum"] == 0.25
    assert "default_json" not in scale
