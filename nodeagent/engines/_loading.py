"""Reading an engine's output while it loads.

Wording drifts between versions: a line that is not recognised says nothing, which is better than a
guess. A percentage is passed on only where the engine itself prints one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from msgspec import Struct

from nodeagent.engines._base import LoadProgress


class Milestone(Struct, frozen=True):
    """A recognisable line. `detail` may use the pattern's named groups; `percent` is the percentage."""

    pattern: re.Pattern[str]
    detail: str


def milestone(pattern: str, detail: str) -> Milestone:
    """A milestone of a regular expression."""
    return Milestone(re.compile(pattern), detail)


def recognise(milestones: Sequence[Milestone], line: str) -> LoadProgress | None:
    """What `line` says. Of a progress bar redrawn with carriage returns, the newest state counts."""
    for state in reversed(line.split("\r")):
        for known in milestones:
            found = known.pattern.search(state)
            if found is not None:
                groups = found.groupdict()
                percent = groups.get("percent")
                return LoadProgress(
                    known.detail.format_map(groups), None if percent is None else min(float(percent), 100.0)
                )
    return None


#: llama.cpp's own lines come from llama-server and llama-cpp-python alike. The row of dots is drawn
#: while tensors are read, but ends its line only when they all are, and a small model gets fewer
#: dots than a hundred: it marks an end and is no percentage.
LLAMA_CPP = (
    milestone(
        r"loaded meta data with .* and (?P<tensors>\d+) tensors", "reading the model file ({tensors} tensors)"
    ),
    milestone(r"print_info: file size\s+=\s+(?P<size>[\d.]+ [KMGT]iB)", "loading weights ({size})"),
    milestone(r"load_tensors: loading model tensors", "loading weights"),
    milestone(
        r"load_tensors: offloaded (?P<layers>\d+)/(?P<total>\d+) layers to GPU",
        "loading weights, {layers} of {total} layers to the GPU",
    ),
    milestone(
        r"load_tensors:\s+(?P<device>\S+) model buffer size =\s+(?P<size>[\d.]+ MiB)",
        "loading weights, {size} to {device}",
    ),
    milestone(r"^\.{4,}$", "weights loaded"),
    milestone(r"llama_context: constructing llama_context", "preparing the context"),
    milestone(r"llama_kv_cache[\w ]*: size =\s+(?P<size>[\d.]+ MiB)", "KV cache of {size} allocated"),
    milestone(r"warming up the model", "warming up"),
    milestone(r"server is listening on \S+ - starting the main loop", "ready"),
    milestone(r"\bmain: model loaded", "model loaded"),
    milestone(r"Uvicorn running on ", "ready"),
)

VLLM = (
    milestone(
        r"Loading \w+ checkpoint shards:\s+(?P<percent>\d+)% Completed \| (?P<done>\d+)/(?P<total>\d+)",
        "loading weights, {done} of {total} shards",
    ),
    milestone(r"Starting to load model (?P<model>\S+?)\.{3}", "loading {model}"),
    milestone(r"Loading weights took (?P<time>[\d.]+) seconds", "weights read in {time} s"),
    milestone(r"Model loading took (?P<size>[\d.]+ GiB)", "weights loaded ({size})"),
    milestone(r"torch\.compile takes (?P<time>[\d.]+) s", "compiled in {time} s"),
    milestone(r"(?:Start compiling|Compiling a graph|Using cache directory: \S*torch_compile)", "compiling"),
    milestone(r"Available KV cache memory: (?P<size>[\d.]+ GiB)", "{size} left for the KV cache"),
    milestone(r"GPU KV cache size: (?P<tokens>[\d,]+) tokens", "KV cache of {tokens} tokens"),
    milestone(
        r"Capturing CUDA graph[^:]*:\s+(?P<percent>\d+)%\|.*?\| (?P<done>\d+)/(?P<total>\d+)",
        "capturing CUDA graphs, {done} of {total}",
    ),
    milestone(r"Capturing CUDA graph[^:]*:\s+(?P<percent>\d+)%", "capturing CUDA graphs"),
    milestone(r"Capturing (?:the model for )?CUDA graphs?", "capturing CUDA graphs"),
    milestone(r"Graph capturing finished in (?P<time>[\d.]+) secs", "CUDA graphs captured in {time} s"),
    milestone(r"Application startup complete", "ready"),
)
