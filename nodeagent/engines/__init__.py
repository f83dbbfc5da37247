"""Adapters: one for each dialect that an engine may speak."""

from nodeagent.engines._base import (
    DEEPEST_LEVEL,
    CommandLine,
    EngineAdapter,
    EngineHealth,
    EngineStream,
    FreeControl,
    GenerateControl,
    Generation,
    LoadProgress,
    Probe,
    PullControl,
    PullProgress,
    RunKind,
    ShrinkControl,
    SleepControl,
    VoiceControl,
)
from nodeagent.engines._choose import adapter_for
from nodeagent.engines._comfyui import ComfyUiAdapter, ComfyUiDevice, ComfyUiQueue
from nodeagent.engines._hunyuan3d import Hunyuan3dAdapter
from nodeagent.engines._llama_router import LlamaRouterAdapter
from nodeagent.engines._llamacpp import LlamaCppAdapter
from nodeagent.engines._ollama import OllamaAdapter, OllamaModel
from nodeagent.engines._openai_compatible import OpenAiCompatibleAdapter
from nodeagent.engines._piper import PiperAdapter
from nodeagent.engines._prediction import PredictionAdapter
from nodeagent.engines._sana import SanaAdapter
from nodeagent.engines._speaches import SpeachesAdapter
from nodeagent.engines._vllm import VllmAdapter
from nodeagent.engines._worker import WorkerAdapter, WorkerMemory
from nodeagent.engines._xtts import XttsAdapter

__all__ = [
    "DEEPEST_LEVEL",
    "ComfyUiAdapter",
    "ComfyUiDevice",
    "ComfyUiQueue",
    "CommandLine",
    "EngineAdapter",
    "EngineHealth",
    "EngineStream",
    "FreeControl",
    "GenerateControl",
    "Generation",
    "Hunyuan3dAdapter",
    "LlamaCppAdapter",
    "LlamaRouterAdapter",
    "LoadProgress",
    "OllamaAdapter",
    "OllamaModel",
    "OpenAiCompatibleAdapter",
    "PiperAdapter",
    "PredictionAdapter",
    "Probe",
    "PullControl",
    "PullProgress",
    "RunKind",
    "SanaAdapter",
    "ShrinkControl",
    "SleepControl",
    "SpeachesAdapter",
    "VllmAdapter",
    "VoiceControl",
    "WorkerAdapter",
    "WorkerMemory",
    "XttsAdapter",
    "adapter_for",
]
