"""Which adapter an engine needs."""

from __future__ import annotations

from nodeagent.engines._base import EngineAdapter
from nodeagent.engines._comfyui import ComfyUiAdapter
from nodeagent.engines._hunyuan3d import Hunyuan3dAdapter
from nodeagent.engines._llama_router import LlamaRouterAdapter
from nodeagent.engines._llamacpp import LlamaCppAdapter
from nodeagent.engines._ollama import OllamaAdapter
from nodeagent.engines._openai_compatible import OpenAiCompatibleAdapter
from nodeagent.engines._piper import PiperAdapter
from nodeagent.engines._prediction import PredictionAdapter
from nodeagent.engines._sana import SanaAdapter
from nodeagent.engines._speaches import SpeachesAdapter
from nodeagent.engines._vllm import VllmAdapter
from nodeagent.engines._xtts import XttsAdapter
from rung.errors import NotImplementedYetError
from rung.service import EngineClient
from rung.types import (
    ComfyUiEngine,
    Engine,
    LlamaCppEngine,
    OllamaEngine,
    OpenAiCompatibleEngine,
    ServiceEngine,
    VllmEngine,
)


def adapter_for(engine: Engine, client: EngineClient) -> EngineAdapter:
    """The adapter that speaks the engine's dialect.

    Raises:
        NotImplementedYetError: a service with an unknown dialect.
    """
    match engine:
        case LlamaCppEngine(router_model=router_model):
            return LlamaRouterAdapter(client) if router_model else LlamaCppAdapter(client)
        case VllmEngine():
            return VllmAdapter(client)
        case OllamaEngine():
            return OllamaAdapter(client)
        case OpenAiCompatibleEngine():
            return OpenAiCompatibleAdapter(client)
        case ComfyUiEngine():
            return ComfyUiAdapter(client)
        case ServiceEngine(dialect="hunyuan3d"):
            return Hunyuan3dAdapter(client)
        case ServiceEngine(dialect="sana"):
            return SanaAdapter(client)
        case ServiceEngine(dialect="prediction"):
            return PredictionAdapter(client)
        case ServiceEngine(dialect="speaches"):
            return SpeachesAdapter(client)
        case ServiceEngine(dialect="piper"):
            return PiperAdapter(client)
        case ServiceEngine(dialect="xtts"):
            return XttsAdapter(client)
        case ServiceEngine(dialect=dialect):
            raise NotImplementedYetError(f"this version knows no engine of the dialect {dialect!r}")
