"""Cloud models as targets: who there is, why one cannot answer, and how an answer is opened."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Protocol

import structlog
from msgspec import Struct
from prometheus_client import CollectorRegistry, Counter, Gauge

from controlplane.cloud._anthropic_answer import AnthropicAnswer
from controlplane.cloud._anthropic_request import anthropic_body
from controlplane.cloud._estimate import likely_usage, most_tokens
from controlplane.cloud._failure import CloudFailure, CloudFailureKind, classify_failure
from controlplane.cloud._keys import ApiKey, read_key
from controlplane.cloud._openai import OpenAiAnswer, openai_body, quirks_of, request_fields
from controlplane.cloud._spend import CloudCall, CloudSpend
from controlplane.cloud._values import (
    MICRO_USD_PER_USD,
    CloudModel,
    CloudProvider,
    CloudUsage,
    Dialect,
)
from controlplane.ladder import Candidate, TargetKind
from rung.errors import (
    EngineFailedError,
    EngineProtocolError,
    EngineRejectedError,
    EngineUnreachableError,
    RungError,
    UnavailableError,
    UnknownModelError,
)
from rung.service import EngineClient, EngineReply

_log = structlog.get_logger("rung.cloud")

_ANTHROPIC_VERSION = "2023-06-01"
_LARGEST_ERROR_BYTES = 64 * 1024
#: Trouble that does not pass by itself is looked into again after so long.
_HOLD_S = {CloudFailureKind.KEY: 600.0, CloudFailureKind.CONFIG: 600.0, CloudFailureKind.BALANCE: 3600.0}


class AnswerTranslator(Protocol):
    """Turns a provider's answer into OpenAI's shapes, piece by piece, and notes what it costs."""

    #: What the provider has said of it so far.
    usage: CloudUsage | None
    #: Whether that is the last word.
    final: bool
    #: Text that came, thoughts and calls of tools with it.
    delivered_bytes: int

    def feed(self, chunk: bytes) -> bytes:
        """Take a piece of a stream; returns what to pass on of it."""
        ...

    def finish(self) -> bytes:
        """The stream has ended; returns what is still to be passed on."""
        ...

    def whole(self, body: bytes) -> bytes:
        """Take an answer that came in one piece. Raises EngineProtocolError."""
        ...


class CloudReply:
    """The answer of a cloud model in OpenAI's shapes, whatever its dialect; its status is a success.

    Leave it always as a context: that settles what the call has cost, if the end of the body has not done
    so already. `cost_usd` is right from then on.
    """

    def __init__(
        self,
        upstream: EngineReply,
        translator: AnswerTranslator,
        *,
        stream: bool,
        most: CloudUsage,
        settle: Callable[[CloudUsage], float],
    ) -> None:
        self.status = upstream.status
        self.content_type = "text/event-stream; charset=utf-8" if stream else "application/json"
        self.retry_after = ""
        self.cost_usd = 0.0
        self._upstream = upstream
        self._translator = translator
        self._stream = stream
        self._most = most
        self._settle = settle
        self._settled = False

    @property
    def usage(self) -> CloudUsage | None:
        """Tokens of the call, once the provider has told them."""
        return self._translator.usage

    async def chunks(self, interval_s: Callable[[], float] | None = None) -> AsyncIterator[bytes]:
        """The body as it comes, in whole events. Raises as `EngineReply.chunks`."""
        async for chunk in self._upstream.chunks(interval_s):
            if out := self._translator.feed(chunk):
                yield out
        out = self._translator.finish()
        self._settle_once()
        if out:
            yield out

    async def read(self) -> bytes:
        """The whole body. Raises as `EngineReply.read`, and EngineProtocolError: it is no answer."""
        body = self._translator.whole(await self._upstream.read())
        self._settle_once()
        return body

    async def __aenter__(self) -> CloudReply:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go, and settle the call; before the end of the body this breaks the generation off."""
        self._settle_once()
        await self._upstream.aclose()

    def _settle_once(self) -> None:
        if not self._settled:
            self._settled = True
            self.cost_usd = self._settle(self._billed())

    def _billed(self) -> CloudUsage:
        translator = self._translator
        if translator.final and translator.usage is not None:
            return translator.usage
        # One in one piece was perhaps generated to its end, even if it did not arrive.
        return (
            likely_usage(self._most, translator.usage, translator.delivered_bytes)
            if self._stream
            else self._most
        )


class PaidCall:
    """A call that is paid for otherwise than by tokens: its answer, and what it has cost so far."""

    __slots__ = ("cost_micro_usd", "reply")

    def __init__(self, reply: EngineReply, cost_micro_usd: int) -> None:
        self.reply = reply
        self.cost_micro_usd = cost_micro_usd


class _Hold(Struct, frozen=True):
    """Why a provider or a target is left alone, until when."""

    reason: str
    until_s: float


class CloudTargets:
    """All cloud models that are configured.

    Made once, at the start::

        providers = config.cloud_providers()
        spend = await CloudSpend.open(providers, CloudCalls(store))
        stack.push_async_callback(spend.aclose)  # after the store's own, so that it runs before
        targets = CloudTargets(providers, client, spend, registry)

    For the ladder, `candidates` is what there is (it never changes) and `refusal` why one cannot answer
    now; neither waits for anything. For a request, `open` gives a reply that is relayed like an engine's.

    Keys are read here, once, and leave only in the header of a request to their own provider.

    Args:
        providers: as configured.
        client: for the connections.
        spend: the budgets; of the same providers.
        registry: for what Prometheus is told.
        environment: where keys are looked for.
        now_s: Unix time.
    """

    def __init__(
        self,
        providers: Sequence[CloudProvider],
        client: EngineClient,
        spend: CloudSpend,
        registry: CollectorRegistry,
        *,
        environment: Mapping[str, str] | None = None,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._spend = spend
        self._now_s = now_s
        self._providers = {provider.id: provider for provider in providers}
        self._models = {model.id: model for provider in providers for model in provider.models}
        self._candidates = {
            name: _candidate(model) for model in self._models.values() for name in (model.id, *model.aliases)
        }
        found = os.environ if environment is None else environment
        self._keys = {provider.id: read_key(provider, found) for provider in providers}
        self._holds: dict[str, _Hold] = {}
        self._spent = Counter(
            "rung_cloud_spend_usd",
            "US dollars spent on cloud models",
            ["provider", "model"],
            registry=registry,
        )
        reserved = Gauge(
            "rung_cloud_reserved_usd",
            "US dollars reserved by calls that run",
            ["provider"],
            registry=registry,
        )
        for provider in providers:
            reserved.labels(provider.id).set_function(self._reserved_of(provider.id))
            key = self._keys[provider.id]
            if isinstance(key, str):
                _log.warning("cloud_provider_refused", provider=provider.id, reason=key)

    @property
    def candidates(self) -> Mapping[str, Candidate]:
        """All targets as the ladder has them, by id and by alias; they never change."""
        return self._candidates

    def models(self) -> tuple[CloudModel, ...]:
        """All targets, in the order of the configuration."""
        return tuple(self._models.values())

    def model(self, target_id: str) -> CloudModel:
        """A target. Raises UnknownModelError."""
        model = self._models.get(target_id)
        if model is None:
            raise UnknownModelError(f"there is no cloud model {target_id!r}", model=target_id)
        return model

    def model_name(self, target_id: str) -> str:
        """The provider's own name of a model. Raises UnknownModelError."""
        return self.model(target_id).model

    def refusal(self, target_id: str) -> str:
        """Why a target cannot answer now: no key, no money, or it said so itself. Empty if it can.

        Raises:
            UnknownModelError: there is no such target.
        """
        model = self.model(target_id)
        return self._trouble(model) or self._spend.refusal(model.provider)

    def _trouble(self, model: CloudModel) -> str:
        """Why a target cannot answer, money left aside."""
        key = self._keys[model.provider]
        if isinstance(key, str):
            return key
        now_s = self._now_s()
        for name in (model.provider, model.id):
            hold = self._holds.get(name)
            if hold is not None and now_s < hold.until_s:
                return f"{hold.reason}; it is tried again in {hold.until_s - now_s:.0f} s"
        return ""

    async def open(self, target_id: str, body: bytes, *, stream: bool, idle_timeout_s: float) -> CloudReply:
        """Send a chat request and return once the provider begins to answer.

        Args:
            target_id: `provider/model`.
            body: OpenAI's chat request; its `model`, `stream` and `stream_options` are replaced.
            stream: whether the answer comes as server-sent events.
            idle_timeout_s: longest silence of the provider.

        Raises:
            UnknownModelError: there is no such target.
            InvalidRequestError: the request cannot be understood.
            UnsuitableTargetError: the target cannot do what the request wants; another may.
            EngineRejectedError: the provider says that the request is wrong.
            BudgetExhaustedError: the daily cap does not leave what the call could cost.
            EngineFailedError: the provider is in trouble, or we are with it: `metadata` has
                `engine_status`, `failure` (a `CloudFailureKind`), and `retry_after` in seconds if it said.
            UnavailableError: the target is refused; and, as EngineUnreachableError and
                EngineProtocolError, what goes wrong on the way.
            EngineTimeoutError: it said nothing for the idle timeout.
        """
        model = self.model(target_id)
        provider, key = self._may_ask(model)
        fields = request_fields(body)
        request, translator = self._prepare(provider, model, fields, stream=stream)
        most = most_tokens(fields, len(body), model)
        call = await self._spend.reserve(provider.id, model.id, most.cost_micro_usd(model.prices))
        try:
            upstream = await self._post(provider, model, key, request, idle_timeout_s)
        except EngineUnreachableError:
            self._spend.settle(call, 0)
            raise
        except BaseException:
            # It was sent, and nobody knows how far the provider got; a stream had not begun to speak.
            self._settle(call, model, likely_usage(most, None, 0) if stream else most)
            raise
        try:
            await self._check(upstream, model, provider, key, stream=stream)
        except BaseException:
            # What was refused costs nothing; what was answered in a shape of its own is paid all the same.
            self._settle(call, model, most if 200 <= upstream.status < 300 else CloudUsage())
            await upstream.aclose()
            raise
        settle = partial(self._settle, call, model)
        return CloudReply(upstream, translator, stream=stream, most=most, settle=settle)

    @asynccontextmanager
    async def paid_call(
        self,
        target_id: str,
        path: str,
        body: bytes,
        *,
        content_type: str,
        most_micro_usd: int,
        idle_timeout_s: float,
    ) -> AsyncIterator[PaidCall]:
        """Send what is not paid for by tokens, in OpenAI's dialect; the context has its successful answer.

        Leaving the context settles it at its `cost_micro_usd`, which is the most until somebody knows better.

        Args:
            target_id: `provider/model`.
            path: under the base URL, from its slash on.
            body: of the kind `content_type`.
            content_type: of the body.
            most_micro_usd: what it can cost, in millionths of a dollar.
            idle_timeout_s: longest silence of the provider.

        Raises:
            RungError: as `open`.
        """
        model = self.model(target_id)
        provider, key = self._may_ask(model)
        call = await self._spend.reserve(provider.id, model.id, most_micro_usd)
        paid: PaidCall | None = None
        cost_micro_usd = most_micro_usd
        try:
            try:
                upstream = await self._client.post(
                    provider.base_url + path,
                    body,
                    what=model.id,
                    idle_timeout_s=idle_timeout_s,
                    api_key=key.value,
                    content_type=content_type,
                )
            except EngineUnreachableError:
                cost_micro_usd = 0
                raise
            async with upstream:
                if not 200 <= upstream.status < 300:
                    cost_micro_usd = 0
                await self._check(upstream, model, provider, key, stream=False)
                paid = PaidCall(upstream, most_micro_usd)
                yield paid
        finally:
            self._paid(call, model, cost_micro_usd if paid is None else paid.cost_micro_usd)

    def _may_ask(self, model: CloudModel) -> tuple[CloudProvider, ApiKey]:
        """Provider and key of a target. Raises UnavailableError: it is left alone."""
        key = self._keys[model.provider]
        trouble = self._trouble(model)
        if trouble or isinstance(key, str):
            raise UnavailableError(f"{model.id} cannot be asked: {trouble}", target=model.id)
        return self._providers[model.provider], key

    def _prepare(
        self, provider: CloudProvider, model: CloudModel, fields: dict[str, object], *, stream: bool
    ) -> tuple[bytes, AnswerTranslator]:
        if provider.dialect is Dialect.ANTHROPIC:
            body = anthropic_body(fields, model, stream=stream)
            return body, AnthropicAnswer(model.id, model.model, created_s=int(self._now_s()))
        body = openai_body(fields, model, stream=stream, quirks=quirks_of(provider.id))
        return body, OpenAiAnswer(model.id)

    async def _post(
        self, provider: CloudProvider, model: CloudModel, key: ApiKey, body: bytes, idle_timeout_s: float
    ) -> EngineReply:
        if provider.dialect is Dialect.ANTHROPIC:
            return await self._client.post(
                f"{provider.base_url}/messages",
                body,
                what=model.id,
                idle_timeout_s=idle_timeout_s,
                headers=(("x-api-key", key.value), ("anthropic-version", _ANTHROPIC_VERSION)),
            )
        return await self._client.post(
            f"{provider.base_url}/chat/completions",
            body,
            what=model.id,
            idle_timeout_s=idle_timeout_s,
            api_key=key.value,
        )

    async def _check(
        self, upstream: EngineReply, model: CloudModel, provider: CloudProvider, key: ApiKey, *, stream: bool
    ) -> None:
        """Raise what an answer means that is none."""
        if not 200 <= upstream.status < 300:
            body = await _beginning(upstream)
            headers = {**upstream.limits, "retry-after": upstream.retry_after}
            failure = classify_failure(upstream.status, headers, body, self._now_s())
            self._hold(failure, model, provider)
            raise _error_of(failure, upstream.status, model.id, provider, key)
        if stream and not upstream.content_type.startswith("text/event-stream"):
            raise EngineProtocolError(
                f"{model.id} answered a stream with {upstream.content_type or 'no content type'}",
                engine=model.id,
            )

    def _hold(self, failure: CloudFailure, model: CloudModel, provider: CloudProvider) -> None:
        hold_s = _HOLD_S.get(failure.kind)
        if hold_s is None:
            return
        reasons = {
            CloudFailureKind.KEY: f"{provider.id} refuses our key",
            CloudFailureKind.CONFIG: f"{provider.id} has no {model.model} at {provider.base_url}",
            CloudFailureKind.BALANCE: f"our account with {provider.id} has no money or quota left",
        }
        name = model.id if failure.kind is CloudFailureKind.CONFIG else provider.id
        until_s = self._now_s() + max(hold_s, failure.retry_after_s or 0.0)
        self._holds[name] = _Hold(reasons[failure.kind], until_s)
        _log.warning("cloud_target_held", target=name, reason=reasons[failure.kind], until_s=until_s)

    def _settle(self, call: CloudCall, model: CloudModel, usage: CloudUsage) -> float:
        """Write down what a call has cost; returns it in dollars."""
        return self._paid(call, model, usage.cost_micro_usd(model.prices))

    def _paid(self, call: CloudCall, model: CloudModel, cost_micro_usd: int) -> float:
        self._spend.settle(call, cost_micro_usd)
        usd = cost_micro_usd / MICRO_USD_PER_USD
        self._spent.labels(model.provider, model.id).inc(usd)
        return usd

    def _reserved_of(self, provider: str) -> Callable[[], float]:
        return lambda: self._spend.spending(provider).reserved_micro_usd / MICRO_USD_PER_USD


def _candidate(model: CloudModel) -> Candidate:
    return Candidate(
        id=model.id,
        kind=TargetKind.CLOUD,
        owned=False,
        state=f"a cloud model of {model.provider}",
        capabilities=frozenset(model.capabilities),
        context_tokens=model.context_tokens,
        usd_per_million_tokens=model.prices.completion_usd,
    )


async def _beginning(upstream: EngineReply) -> bytes:
    """The body of an error, or as much of it as a message can have."""
    body = b""
    try:
        async for chunk in upstream.chunks():
            body += chunk
            if len(body) >= _LARGEST_ERROR_BYTES:
                break
    except RungError:
        # Its status has said enough.
        return body
    return body


def _error_of(
    failure: CloudFailure, status: int, target_id: str, provider: CloudProvider, key: ApiKey
) -> RungError:
    metadata = {"engine": target_id, "engine_status": str(status), "failure": failure.kind.value}
    if failure.code:
        metadata["engine_code"] = key.hide(failure.code)
    if failure.retry_after_s is not None:
        metadata["retry_after"] = f"{failure.retry_after_s:.3f}".rstrip("0").rstrip(".")
    message = key.hide(failure.message)
    if failure.kind is CloudFailureKind.CALLER:
        return EngineRejectedError(
            message or f"{target_id} refused the request with HTTP {status}", **metadata
        )
    if failure.kind is CloudFailureKind.KEY:
        # Its own words may quote a part of the key.
        where = provider.api_key_env or str(provider.api_key_file)
        return EngineFailedError(f"{target_id} refused the key of {where} with HTTP {status}", **metadata)
    return EngineFailedError(
        f"{target_id} answered HTTP {status}" + (f": {message}" if message else ""), **metadata
    )
