"""The demo's machines and models, and the files that describe them."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from msgspec import Struct

from controlplane.demo._ladder_layout import CLOUD_KEY, cloud_provider, ladder, profiles
from controlplane.demo._sweeper import MARK
from rung.errors import FailedPreconditionError
from rung.types import LlamaCppServer

#: How many times faster than life the simulated engines are.
SPEED = 4.0
WORKSTATION = "workstation"
SPARK = "spark"
ORCHESTRATOR = "orchestrator"
THINKER = "thinker"
REASONER = "reasoner"
COMFYUI = "comfyui"
_ORCHESTRATOR_MODEL = "nemotron-8b"
_ORCHESTRATOR_WEIGHTS = "nemotron-8b-awq"
_ORCHESTRATOR_UTILIZATION = 0.36
_ORCHESTRATOR_LOAD_S = 0.8
_THINKER_MODEL = "qwen3-32b"
_THINKER_WEIGHTS = "qwen3-32b-fp8"
_THINKER_LOAD_S = 1.5
_REASONER_MODEL = "deepseek-r1-14b"
_REASONER_WEIGHTS = "deepseek-r1-14b-awq"
#: Beside the orchestrator it leaves room for the least image. A real engine takes nothing of the simulated
#: card, so that the reasoner takes more of it then.
_REASONER_UTILIZATION = 0.33
_REASONER_UTILIZATION_ALONE = 0.6
_REASONER_LOAD_S = 1.0
#: For itself, and for each checkpoint.
_COMFYUI_LOAD_S = 0.2
_CONTEXT_TOKENS = 4096
#: Of an answer: room for all that a simulated engine says, and for a call of a tool.
MOST_TOKENS = 96
#: A real model says as much as it may, and on a CPU that takes seconds.
MOST_TOKENS_OF_REAL = 32


class DemoOptions(Struct, frozen=True, kw_only=True):
    """What to show. `gguf` is answered from by a real llama.cpp; `serve` keeps everything running."""

    serve: bool = False
    gguf: Path | None = None


class LocalLlamaCpp(Struct, frozen=True, kw_only=True):
    """A llama.cpp on this computer, and how to run it."""

    server: LlamaCppServer
    path: str
    arguments_prefix: tuple[str, ...] = ()


class Layout(Struct, frozen=True, kw_only=True):
    """A demo in a folder. `llama_cpp` is None where the orchestrator is simulated too."""

    folder: Path
    agent_ports: dict[str, int]
    cloud_port: int
    gguf: Path | None = None
    llama_cpp: LocalLlamaCpp | None = None

    @property
    def config_path(self) -> Path:
        """The control plane's configuration."""
        return self.folder / "rung.yaml"

    @property
    def server_state_dir(self) -> Path:
        """The control plane's state."""
        return self.folder / "controlplane"

    @property
    def orchestrator_model(self) -> str:
        """What the workstation's model is called."""
        return self.gguf.stem if self.gguf is not None else _ORCHESTRATOR_MODEL

    @property
    def thinker_model(self) -> str:
        """What the Spark's model is called."""
        return _THINKER_MODEL

    @property
    def reasoner_model(self) -> str:
        """What the workstation's reasoning model is called."""
        return _REASONER_MODEL

    @property
    def most_tokens(self) -> int:
        """How long an answer of the workstation's model may be."""
        return MOST_TOKENS if self.llama_cpp is None else MOST_TOKENS_OF_REAL

    @property
    def orchestrator_server(self) -> str:
        """What answers from the workstation's model, in words."""
        if self.llama_cpp is None:
            return f"a simulated {self._orchestrator_executable}"
        return self._orchestrator_executable

    @property
    def environment(self) -> dict[str, str]:
        """What marks every process of this demo."""
        return {MARK: str(self.folder)}

    @property
    def cloud_key_path(self) -> Path:
        """The key of the simulated cloud API."""
        return self.folder / "cloud.key"

    def agent_config_path(self, node_id: str) -> Path:
        """An agent's configuration."""
        return self.folder / f"{node_id}.yaml"

    def gpus_dir(self, node_id: str) -> Path:
        """An agent's simulated machine."""
        return self.folder / f"{node_id}-gpus"

    def log_path(self, name: str) -> Path:
        """The output of one of the processes."""
        return self.folder / "logs" / f"{name}.log"

    def write(self) -> None:
        """Write all configuration files. Raises OSError."""
        documents: dict[Path, Any] = {
            self.config_path: self._server_config(),
            self.agent_config_path(WORKSTATION): {"executables": self._workstation_executables()},
            self.agent_config_path(SPARK): {"executables": {"vllm": _simulator("vllm", _THINKER_ARGUMENTS)}},
        }
        for path, document in documents.items():
            path.write_text(yaml.safe_dump(document, sort_keys=False))
        # Readable by its owner only, or it is refused.
        self.cloud_key_path.touch(mode=0o600)
        self.cloud_key_path.write_text(CLOUD_KEY)

    def _server_config(self) -> dict[str, Any]:
        return {
            "server": {"grpc_port": 0, "http_port": 0, "state_dir": str(self.server_state_dir)},
            "nodes": [
                {"id": node_id, "address": f"127.0.0.1:{port}"} for node_id, port in self.agent_ports.items()
            ],
            "deployments": [self._orchestrator(), self._reasoner(), self._comfyui(), self._thinker()],
            "profiles": profiles(ORCHESTRATOR),
            "cloud": [cloud_provider(f"http://127.0.0.1:{self.cloud_port}", self.cloud_key_path)],
            "ladder": ladder(
                ORCHESTRATOR,
                [f"{SPARK}/{self.thinker_model}", f"{WORKSTATION}/{self.reasoner_model}"],
            ),
        }

    def _orchestrator(self) -> dict[str, Any]:
        settings: dict[str, str] = {}
        if self.llama_cpp is not None:
            engine: dict[str, Any] = {
                "kind": "llamacpp",
                "model_path": str(self.gguf),
                "server": self.llama_cpp.server.value,
                "context_tokens": _CONTEXT_TOKENS,
            }
        else:
            engine = {
                "kind": "vllm",
                "model": _ORCHESTRATOR_WEIGHTS,
                "gpu_memory_utilization": _ORCHESTRATOR_UTILIZATION,
                "max_model_len_tokens": _CONTEXT_TOKENS,
                "sleep_mode": True,
                "tool_call_parser": "hermes",
            }
            settings = {"RUNG_SIM_LOAD_S": f"{_ORCHESTRATOR_LOAD_S:g}"}
        return {
            "id": ORCHESTRATOR,
            "node": WORKSTATION,
            "model": self.orchestrator_model,
            "residency_class": "pinned",
            "shrinkable": self.llama_cpp is None,
            "capabilities": ["chat", "tools"],
            "slots": 1 if self.llama_cpp is not None else 4,
            "engine": engine,
            "runtime": self._runtime(self._orchestrator_executable, WORKSTATION, **settings),
        }

    def _reasoner(self) -> dict[str, Any]:
        alone = self.llama_cpp is not None
        return {
            "id": REASONER,
            "node": WORKSTATION,
            "model": _REASONER_MODEL,
            "residency_class": "sleepable",
            "engine": {
                "kind": "vllm",
                "model": _REASONER_WEIGHTS,
                "gpu_memory_utilization": _REASONER_UTILIZATION_ALONE if alone else _REASONER_UTILIZATION,
                "max_model_len_tokens": _CONTEXT_TOKENS,
                "sleep_mode": True,
            },
            "runtime": self._runtime("vllm", WORKSTATION, RUNG_SIM_LOAD_S=f"{_REASONER_LOAD_S:g}"),
        }

    def _comfyui(self) -> dict[str, Any]:
        return {
            "id": COMFYUI,
            "node": WORKSTATION,
            "model": COMFYUI,
            "residency_class": "cache",
            "capabilities": ["image"],
            "engine": {"kind": "comfyui"},
            "runtime": self._runtime("comfyui", WORKSTATION, RUNG_SIM_LOAD_S=f"{_COMFYUI_LOAD_S:g}"),
        }

    def _thinker(self) -> dict[str, Any]:
        return {
            "id": THINKER,
            "node": SPARK,
            "model": self.thinker_model,
            "residency_class": "on_demand",
            "engine": {"kind": "openai_compatible", "health_path": "/health"},
            "runtime": self._runtime("vllm", SPARK, RUNG_SIM_LOAD_S=f"{_THINKER_LOAD_S:g}"),
        }

    def _runtime(self, executable: str, node_id: str, **settings: str) -> dict[str, Any]:
        environment = {
            **self.environment,
            "RUNG_SIM_GPUS": str(self.gpus_dir(node_id)),
            "RUNG_SIM_SPEED": f"{SPEED:g}",
            **settings,
        }
        return {"kind": "process", "executable": executable, "environment": environment}

    @property
    def _orchestrator_executable(self) -> str:
        """By which name the agent runs it, and says that it starts it."""
        return "vllm" if self.llama_cpp is None else self.llama_cpp.server.value

    def _workstation_executables(self) -> dict[str, Any]:
        found = self.llama_cpp
        simulated = {name: _simulator(name, ()) for name in ("vllm", "comfyui")}
        if found is None:
            return simulated
        return simulated | {
            self._orchestrator_executable: {
                "path": found.path,
                "arguments_prefix": list(found.arguments_prefix),
                "allow_environment": True,
            }
        }


_THINKER_ARGUMENTS = (
    _THINKER_WEIGHTS,
    "--served-model-name",
    _THINKER_MODEL,
    "--gpu-memory-utilization",
    "0.45",
)


def _simulator(module: str, arguments: tuple[str, ...]) -> dict[str, Any]:
    return {
        "path": sys.executable,
        "arguments_prefix": ["-m", f"nodeagent.simulators.{module}", *arguments],
        "allow_environment": True,
    }


def find_llama_cpp() -> LocalLlamaCpp:
    """The llama.cpp of this computer.

    Raises:
        FailedPreconditionError: there is none.
    """
    path = shutil.which("llama-server")
    if path is not None:
        return LocalLlamaCpp(server=LlamaCppServer.LLAMA_SERVER, path=path)
    if importlib.util.find_spec("llama_cpp") is not None:
        return LocalLlamaCpp(
            server=LlamaCppServer.LLAMA_CPP_PYTHON,
            path=sys.executable,
            arguments_prefix=("-m", "llama_cpp.server"),
        )
    raise FailedPreconditionError(
        "--gguf needs a llama.cpp: put llama-server on PATH, or pip install 'llama-cpp-python[server]'"
    )
