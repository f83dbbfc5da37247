"""Rung: a fleet of GPUs as one big, well-mannered machine. This is its client.

    async with rung.AsyncClient() as client:
        async for event in client.chat("Why is the sky blue?"):
            ...

    with rung.Client() as client:
        print(client.chat("Why is the sky blue?").text())
        client.image("a cat", tier="quality").result().images[0].save("cat.png")

All values are `rung.types`, all failures `rung.errors`; the ones that most callers need are here.
"""

from rung import errors, types
from rung._client import AsyncClient
from rung._client_generation import GenerationStream
from rung._client_jobs import JobStream
from rung._client_leases import HeldLease
from rung._failure import error_of_failure, reason_of_error
from rung._result import ArtifactFile, GenerationResult
from rung._sync_calls import Stream, SyncGenerationStream, SyncJobStream
from rung._sync_client import Client
from rung.errors import (
    InvalidRequestError,
    JobCancelledError,
    NotFoundError,
    RungError,
    UnavailableError,
    UnknownModelError,
)
from rung.transport import TlsOptions
from rung.types import (
    ChatMessage,
    ChatResult,
    ClassifyTask,
    Deployment,
    Embeddings,
    FleetSnapshot,
    ForecastTask,
    ImageInput,
    ImagePart,
    Job,
    JobEvent,
    JobState,
    LifecycleEvent,
    Model,
    Node,
    Policy,
    Predictions,
    Priority,
    RegressTask,
    Tool,
    ToolCall,
    Usage,
)

__all__ = [
    "ArtifactFile",
    "AsyncClient",
    "ChatMessage",
    "ChatResult",
    "ClassifyTask",
    "Client",
    "Deployment",
    "Embeddings",
    "FleetSnapshot",
    "ForecastTask",
    "GenerationResult",
    "GenerationStream",
    "HeldLease",
    "ImageInput",
    "ImagePart",
    "InvalidRequestError",
    "Job",
    "JobCancelledError",
    "JobEvent",
    "JobState",
    "JobStream",
    "LifecycleEvent",
    "Model",
    "Node",
    "NotFoundError",
    "Policy",
    "Predictions",
    "Priority",
    "RegressTask",
    "RungError",
    "Stream",
    "SyncGenerationStream",
    "SyncJobStream",
    "TlsOptions",
    "Tool",
    "ToolCall",
    "UnavailableError",
    "UnknownModelError",
    "Usage",
    "error_of_failure",
    "errors",
    "reason_of_error",
    "types",
]
