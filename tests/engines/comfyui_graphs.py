"""Graphs in ComfyUI's API format, for tests: with a sampler, with two, and without any weights."""

from __future__ import annotations

from typing import Any, TypeAlias

Graph: TypeAlias = dict[str, Any]


def node(class_type: str, **inputs: object) -> dict[str, Any]:
    """One node."""
    return {"class_type": class_type, "inputs": inputs}


def sampled(checkpoint: str, *, seed: int, steps: int, side: int, count: int = 1) -> Graph:
    """A graph that samples once: the sampler is node 3, what is saved node 9."""
    links = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
    how = {"cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    return {
        "4": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "5": node("EmptyLatentImage", width=side, height=side, batch_size=count),
        "6": node("CLIPTextEncode", text="a cat", clip=["4", 1]),
        "7": node("CLIPTextEncode", text="", clip=["4", 1]),
        "3": node("KSampler", seed=seed, steps=steps, **how, **links),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", images=["8", 0], filename_prefix="rung"),
    }


def sampled_twice(checkpoint: str, *, seed: int, steps: tuple[int, int], side: int) -> Graph:
    """The same, and what comes out is sampled again by node 10."""
    graph = sampled(checkpoint, seed=seed, steps=steps[0], side=side)
    again = {**graph["3"]["inputs"], "steps": steps[1], "denoise": 0.5, "latent_image": ["3", 0]}
    return {**graph, "10": node("KSampler", **again), "8": node("VAEDecode", samples=["10", 0], vae=["4", 2])}


def painted(width: int = 64, height: int = 48, *, count: int = 1, color: int = 0x336699) -> Graph:
    """A graph without weights."""
    return {
        "1": node("EmptyImage", width=width, height=height, batch_size=count, color=color),
        "2": node("SaveImage", images=["1", 0], filename_prefix="rung/painted"),
    }


def uploaded(name: str, *, width: int, height: int) -> Graph:
    """A graph that reads a file, scales it and inverts it."""
    scaling = {"upscale_method": "bilinear", "crop": "disabled"}
    return {
        "1": node("LoadImage", image=f"@file:{name}"),
        "2": node("ImageScale", image=["1", 0], width=width, height=height, **scaling),
        "3": node("ImageInvert", image=["2", 0]),
        "4": node("SaveImage", images=["3", 0], filename_prefix="rung"),
    }


def changed(graph: Graph, node_id: str, **inputs: object) -> Graph:
    """The same with other inputs of a node; None leaves one out."""
    given = {**graph[node_id]["inputs"], **inputs}
    kept = {name: value for name, value in given.items() if value is not None}
    return {**graph, node_id: {**graph[node_id], "inputs": kept}}
