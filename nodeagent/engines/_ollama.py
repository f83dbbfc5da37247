"""Ollama: many models in one server, each loaded by the first request that names it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager

import msgspec
from msgspec import Struct

from nodeagent.engines._base import (
    CommandLine,
    EngineHealth,
    EngineStream,
    LoadProgress,
    Probe,
    PullProgress,
    RunKind,
)
from nodeagent.engines._loading import LLAMA_CPP, milestone, recognise
from nodeagent.engines._openai_relay import Answer, ask, guarded, relay
from nodeagent.engines._pulling import ModelPull, free_for_models
from nodeagent.engines._tell import tell
from rung.errors import EngineFailedError, EngineProtocolError, InvalidRequestError
from rung.service import EngineClient
from rung.types import DeploymentSpec, OllamaEngine

#: Residency is ours to decide: a model stays until it is told to go.
_FOR_EVER = -1
#: The level of sleep at which weights are dropped.
_UNLOADED = 2
#: An unload waits for requests and then for the driver; Ollama itself gives that 5 s.
_UNLOAD_TIMEOUT_S = 15.0
_UNLOAD_POLL_S = 0.1
_UNLOAD_CALL_TIMEOUT_S = 10.0
_PULL_PAUSE_S = 1.0

_MILESTONES = (
    milestone(r"Listening on \S+", "listening"),
    milestone(r"llama runner started in (?P<time>[\d.]+) seconds", "loaded in {time} s"),
    *LLAMA_CPP,
)


class OllamaModel(Struct, frozen=True, kw_only=True):
    """A loaded model as `/api/ps` has it: Ollama's own estimate, in bytes, not the driver's figure.

    With `vram_bytes` below `size_bytes` a part of the model is on the CPU, and it is slow.
    """

    name: str
    size_bytes: int = msgspec.field(name="size", default=0)
    vram_bytes: int = msgspec.field(name="size_vram", default=0)
    context_tokens: int = msgspec.field(name="context_length", default=0)


class _Loaded(Struct):
    models: list[OllamaModel] | None = None


class _Tag(Struct):
    name: str


class _Tags(Struct):
    models: list[_Tag] | None = None


class _Done(Struct):
    done_reason: str = ""


class _Refusal(Struct):
    error: str = ""


class OllamaAdapter:
    """Speaks to Ollama: its own routes for residency, OpenAI's for generations.

    A deployment whose model is not loaded sleeps: its server runs, and holds none of its weights. That is
    level 2, where they are dropped and read again. A generation would load it too, wherever it finds room,
    so none may be sent to it while it sleeps. With an Ollama of somebody else every generation sets the
    model's keep-alive back to that server's default, and it may fall asleep by itself.

    OpenAI's routes cannot say how long the context is to be: it is the server's, or the model's own, and a
    longer prompt is cut without a word. So a model that is loaded with a shorter one than the deployment
    says is not well, and is not woken.

    Args:
        client: connections to engines.
        unload_timeout_s: how long `free` waits for the model to be gone.
        pull_pause_s: pause after the first attempt of a pull that broke off.
    """

    def __init__(
        self,
        client: EngineClient,
        *,
        unload_timeout_s: float = _UNLOAD_TIMEOUT_S,
        pull_pause_s: float = _PULL_PAUSE_S,
    ) -> None:
        self._client = client
        self._unload_timeout_s = unload_timeout_s
        self._pull_pause_s = pull_pause_s

    def command_line(self, spec: DeploymentSpec, *, listen_host: str, listen_port: int) -> CommandLine:
        """`ollama serve`, for one model that stays.

        Where models are on disk (`OLLAMA_MODELS`) is inherited from the agent, or stands in the spec's
        environment, or is the image's own.

        Raises:
            InvalidRequestError: the spec is not for Ollama, its model runs elsewhere, or requests would
                name it otherwise than Ollama does.
        """
        engine = _engine(spec)
        _refuse_cloud(spec)
        if _full_name(spec.engine_model_name) != _full_name(engine.model):
            raise InvalidRequestError(
                f"{spec.id}: Ollama knows its model as {engine.model!r} only, and requests would say "
                f"{spec.engine_model_name!r}; set served_model_name to {engine.model!r}",
                deployment=spec.id,
            )
        environment = {
            "OLLAMA_HOST": f"{listen_host}:{listen_port}",
            "OLLAMA_KEEP_ALIVE": str(_FOR_EVER),
            # A second one would take memory that nobody granted.
            "OLLAMA_MAX_LOADED_MODELS": "1",
        }
        if spec.context_tokens:
            # Its default is small, and what is longer is cut without a word.
            environment["OLLAMA_CONTEXT_LENGTH"] = str(spec.context_tokens)
        return CommandLine(arguments=("serve",), environment=environment)

    async def probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        """See `EngineAdapter.probe`. It sleeps while its model is not loaded."""
        return await guarded(self._probe(base_url, spec))

    def load_progress(self, line: str) -> LoadProgress | None:
        """See `EngineAdapter.load_progress`. Ollama prints no percentage, so there is none."""
        return recognise(_MILESTONES, line.strip())

    def run(
        self, base_url: str, spec: DeploymentSpec, kind: RunKind, body: bytes, *, idle_timeout_s: float
    ) -> AbstractAsyncContextManager[EngineStream]:
        """See `EngineAdapter.run`.

        Raises:
            InvalidRequestError: the model would be answered for from the internet.
        """
        _refuse_cloud(spec)
        return relay(self._client, base_url, kind, body, what=spec.id, idle_timeout_s=idle_timeout_s)

    @property
    def frees_model(self) -> bool:
        """See `FreeControl.frees_model`: it does."""
        return True

    def sleep_levels(self, spec: DeploymentSpec) -> tuple[int, ...]:
        """See `SleepControl.sleep_levels`: 2, since nothing is kept in host memory."""
        return (_UNLOADED,)

    async def requests(self, base_url: str, spec: DeploymentSpec) -> int | None:
        """See `SleepControl.requests`: Ollama does not say."""
        return None

    async def sleep(self, base_url: str, spec: DeploymentSpec, level: int) -> None:
        """Unload its model, which is all the sleep that there is; as `free`."""
        await self.free(base_url, spec)

    async def wake(self, base_url: str, spec: DeploymentSpec, level: int) -> None:
        """Load the deployment's model and keep it loaded; `level` has no meaning here.

        It may have found room for a part of it only: `loaded` tells.

        Raises:
            EngineUnreachableError, EngineTimeoutError, EngineProtocolError: as the engine client does.
            EngineFailedError: it refused, does not list the model as loaded, or gave it a shorter context
                than the deployment says; then it is unloaded again.
        """
        _refuse_cloud(spec)
        name = spec.engine_model_name
        if "chat" in spec.capabilities or "embedding" not in spec.capabilities:
            path, question = "/api/generate", {"model": name, "keep_alive": _FOR_EVER, "stream": False}
        else:
            # A model that only embeds refuses the other route. Nothing to embed loads it all the same.
            path, question = "/api/embed", {"model": name, "input": [], "keep_alive": _FOR_EVER}
        body = msgspec.json.encode(question)
        timeout_s = spec.engine.start_timeout_s
        answer = await tell(self._client, base_url, path, body, what=spec.id, timeout_s=timeout_s)
        _accepted(spec, path, answer)
        found = await self.loaded(base_url, spec)
        if found is None:
            raise EngineFailedError(f"{spec.id}: Ollama says that it loaded {name}, and does not list it")
        too_short = _too_short(spec, found)
        if too_short:
            await self.free(base_url, spec)
            raise EngineFailedError(f"{spec.id}: {too_short}")

    async def free(self, base_url: str, spec: DeploymentSpec) -> None:
        """Unload the deployment's model, and return once Ollama no longer lists it as loaded.

        Raises:
            EngineUnreachableError, EngineTimeoutError, EngineProtocolError: as the engine client does.
            EngineFailedError: it refused, or still lists the model when the time is over.
        """
        path, name = "/api/generate", spec.engine_model_name
        body = msgspec.json.encode({"model": name, "keep_alive": 0, "stream": False})
        answer = await tell(
            self._client, base_url, path, body, what=spec.id, timeout_s=_UNLOAD_CALL_TIMEOUT_S
        )
        if _accepted(spec, path, answer).done_reason != "unload":
            raise EngineFailedError(f"{spec.id}: Ollama does not say that it unloads {name}")
        deadline = asyncio.get_running_loop().time() + self._unload_timeout_s
        while await self.loaded(base_url, spec) is not None:
            if asyncio.get_running_loop().time() >= deadline:
                raise EngineFailedError(
                    f"{spec.id}: Ollama said that it unloads {name}, and lists it "
                    f"{self._unload_timeout_s:g} s later"
                )
            await asyncio.sleep(_UNLOAD_POLL_S)

    def pulls(self, spec: DeploymentSpec) -> bool:
        """See `PullControl.pulls`."""
        return spec.engine.pulls

    async def pull(
        self,
        base_url: str,
        spec: DeploymentSpec,
        tell: Callable[[PullProgress], None],
        *,
        environment: Mapping[str, str],
    ) -> None:
        """See `PullControl.pull`. It goes on where an earlier pull broke off."""
        _refuse_cloud(spec)
        pull = ModelPull(
            self._client,
            base_url,
            spec.engine_model_name,
            what=spec.id,
            tell=tell,
            free_bytes=lambda: free_for_models(environment),
            pause_s=self._pull_pause_s,
        )
        await pull.run()
        probe = await self.probe(base_url, spec)
        if probe.health is EngineHealth.NO_MODEL:
            raise EngineFailedError(
                f"{spec.id}: Ollama says that it pulled {spec.engine_model_name}, and does not list it"
            )

    async def loaded(self, base_url: str, spec: DeploymentSpec) -> OllamaModel | None:
        """The deployment's model if it is loaded.

        Raises:
            EngineUnreachableError, EngineTimeoutError, EngineProtocolError: as the engine client does.
        """
        answer = await ask(self._client, base_url, "/api/ps", what=spec.id)
        try:
            models = msgspec.json.decode(answer.body, type=_Loaded).models if answer.status == 200 else None
        except msgspec.DecodeError:
            models = None
        if models is None:
            raise EngineProtocolError(f"{spec.id}: /api/ps answers {answer.status} without a list of models")
        wanted = _full_name(spec.engine_model_name)
        return next((model for model in models if _full_name(model.name) == wanted), None)

    async def _probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        elsewhere = _elsewhere(spec)
        if elsewhere:
            return Probe(health=EngineHealth.UNWELL, detail=elsewhere)
        answer = await ask(self._client, base_url, "/api/tags", what=spec.id)
        if answer.status != 200:
            return Probe(health=EngineHealth.UNWELL, detail=f"/api/tags answers {answer.status}")
        try:
            tags = msgspec.json.decode(answer.body, type=_Tags).models or []
        except msgspec.DecodeError:
            return Probe(health=EngineHealth.UNWELL, detail="/api/tags answers with no list of models")
        names = tuple(tag.name for tag in tags)
        wanted = spec.engine_model_name
        if _full_name(wanted) not in {_full_name(name) for name in names}:
            detail = f"Ollama has no model {wanted}; `ollama pull {wanted}` gets it"
            return Probe(health=EngineHealth.NO_MODEL, detail=detail, models=names)
        model = await self.loaded(base_url, spec)
        if model is None:
            return Probe(health=EngineHealth.ASLEEP, detail="its model is not loaded", models=names)
        too_short = _too_short(spec, model)
        if too_short:
            return Probe(
                health=EngineHealth.UNWELL,
                detail=too_short,
                models=names,
                context_tokens=model.context_tokens,
            )
        return Probe(
            health=EngineHealth.READY,
            detail=_residency(model),
            models=names,
            context_tokens=model.context_tokens,
        )


def _engine(spec: DeploymentSpec) -> OllamaEngine:
    engine = spec.engine.engine
    if not isinstance(engine, OllamaEngine):
        raise InvalidRequestError(f"{spec.id} is not an Ollama deployment", deployment=spec.id)
    return engine


def _refuse_cloud(spec: DeploymentSpec) -> None:
    _engine(spec)
    elsewhere = _elsewhere(spec)
    if elsewhere:
        raise InvalidRequestError(f"{spec.id}: {elsewhere}", deployment=spec.id)


def _elsewhere(spec: DeploymentSpec) -> str:
    """Why this node does not answer for the spec's model; empty if it does."""
    for name in (_engine(spec).model, spec.engine_model_name):
        if OllamaEngine(model=name).leaves_node:
            return f"{name} runs on Ollama's servers, not on this node"
    return ""


def _too_short(spec: DeploymentSpec, model: OllamaModel) -> str:
    """What is wrong with the context of a loaded model; empty if nothing is, or Ollama does not tell it."""
    if not 0 < model.context_tokens < spec.context_tokens:
        return ""
    return (
        f"Ollama runs {model.name} with a context of {model.context_tokens} tokens where context_tokens says "
        f"{spec.context_tokens}, and would cut longer prompts without a word; set OLLAMA_CONTEXT_LENGTH for "
        f"that server, or num_ctx in the model, or context_tokens to {model.context_tokens}"
    )


def _full_name(name: str) -> str:
    """With the tag that Ollama adds where there is none."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def _residency(model: OllamaModel) -> str:
    if model.vram_bytes >= model.size_bytes:
        return ""
    share = 100 * (model.size_bytes - model.vram_bytes) / model.size_bytes
    return f"{share:.0f} % of it is on the CPU"


def _accepted(spec: DeploymentSpec, path: str, answer: Answer) -> _Done:
    try:
        if answer.status == 200:
            return msgspec.json.decode(answer.body, type=_Done)
        why = msgspec.json.decode(answer.body, type=_Refusal).error
    except msgspec.DecodeError:
        why = ""
    raise EngineFailedError(
        f"{spec.id}: {path} answers {answer.status}{': ' if why else ''}{why}",
        engine_status=str(answer.status),
    )
