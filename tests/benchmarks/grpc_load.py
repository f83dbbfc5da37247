"""A gRPC load: CONCURRENCY streams in a closed loop. `grpc_load PORT KIND CONCURRENCY SECONDS MODEL`.

KIND is `generate` (Rung's InferenceService) or `run` (a bare agent). Prints JSON as `load` does; a chunk is
a token of the stub engine, however many of them a message has.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import grpc.aio
import uvloop

from rung import v1
from tests.benchmarks.bare_agent import bare_run

_BODY = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "stream": True}).encode()
_TOKEN = " token"


async def main() -> None:
    """Run the load and print what was measured."""
    port, kind, concurrency, seconds, model = sys.argv[1:6]
    ends_at = time.monotonic() + float(seconds)
    first: list[float] = []
    done: list[float] = []
    chunks = 0

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        inference, bare = v1.InferenceServiceStub(channel), bare_run(channel)

        async def caller() -> None:
            nonlocal chunks
            while (began := time.monotonic()) < ends_at:
                seen = False
                if kind == "generate":
                    request = v1.GenerateRequest(model=model, chat=v1.ChatInput(openai_json=_BODY))
                    async for answer in inference.Generate(request):
                        if answer.event.HasField("token"):
                            chunks += answer.event.token.content.count(_TOKEN)
                            if not seen:
                                seen = True
                                first.append(time.monotonic() - began)
                        if time.monotonic() > ends_at:
                            return
                else:
                    async for piece in bare(v1.RunBegin(body=_BODY)):
                        count = piece.data.count(b'"delta":{"content"')
                        chunks += count
                        if count and not seen:
                            seen = True
                            first.append(time.monotonic() - began)
                        if time.monotonic() > ends_at:
                            return
                done.append(time.monotonic() - began)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(int(concurrency)):
                tasks.create_task(caller())
    print(
        json.dumps(
            {
                "requests": len(done),
                "seconds": float(seconds),
                "errors": 0,
                "chunks": chunks,
                "p50_us": _quantile(done, 0.5),
                "p99_us": _quantile(done, 0.99),
                "first_p50_us": _quantile(first, 0.5),
                "first_p99_us": _quantile(first, 0.99),
            }
        )
    )


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))] * 1e6 if values else 0.0


if __name__ == "__main__":
    uvloop.run(main())
