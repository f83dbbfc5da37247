"""From a wish to those who may answer it: reads the snapshot of the fleet, asks nobody."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from msgspec import Struct
from msgspec.structs import replace

from controlplane.fleet import FleetView, models
from controlplane.ladder import (
    AUTO_MODEL,
    BURST_PREFIX,
    OWN_PREFIX,
    Asked,
    Asking,
    Candidate,
    Chain,
    Circuits,
    Demand,
    Group,
    Ladder,
    Modality,
    Passing,
    TargetKind,
    candidate_of,
    chain_of,
    choose,
    explain,
    read_asking,
    refusals,
)
from controlplane.pipelines._openai import RequestHead, count_images, has_images, picture_bytes, read_head
from controlplane.pipelines._slots import Slots
from controlplane.pipelines._wish import Wish
from rung.errors import InvalidRequestError, NoTargetError, UnknownModelError
from rung.types import JobKind, Model, RouteExplanation

_CAPABILITIES = {kind: kind.value for kind in JobKind}
_MODALITIES = {kind: Modality(kind.value) for kind in JobKind}
#: Bytes of a request's JSON for each token, with its syntax: an estimate that errs on the short side.
_BYTES_PER_TOKEN = 5
#: Tokens of a picture at least: what Gemma takes for each; others take more for large ones.
_TOKENS_PER_IMAGE = 256
#: So many names of models are told to who asked for one that there is not.
_NAMES_TOLD = 8
_NOTHING_DEPLOYED = (
    "nothing is deployed yet: start an engine (vLLM, llama.cpp, Ollama, ComfyUI), and `rung up` finds it, or "
    "describe one in rung.yaml, which `rung config init` writes"
)
_VISION = "vision"
_NO_LADDER = Ladder((), {})
_NOTHING: frozenset[str] = frozenset()
_PICTURES = frozenset({_VISION})


class CloudModels(Protocol):
    """The cloud models there are, as candidates, and which of them are left alone now."""

    @property
    def candidates(self) -> Mapping[str, Candidate]:
        """By id and by alias."""
        ...

    def refusal(self, target_id: str) -> str:
        """Why it cannot be used now: no key, the day's money is spent; empty if it can."""
        ...


class Judged(Struct, frozen=True):
    """An effort, and why, for a person."""

    effort: int
    why: str = ""


class FleetPort(Protocol):
    """The fleet, as `controlplane.fleet.Fleet` has it."""

    @property
    def view(self) -> FleetView:
        """The snapshot; another object whenever something changed."""
        ...


class Route(Struct, frozen=True, kw_only=True):
    """Who may answer a wish.

    Attributes:
        chain: the targets, best first.
        demand: what the wish needs of them.
        effort: 1 to 10; 0 for a named model or chain.
        rung: where the effort is on the ladder; empty if it is on none.
        reason: chain behind the `reason` tool; None if the tool is not offered.
        why: how this was found, for a person.
    """

    chain: Chain
    demand: Demand
    effort: int = 0
    rung: str = ""
    reason: Chain | None = None
    why: str = ""

    def reasoning(self) -> Route | None:
        """The route of what the `reason` tool is called with; None if the tool is not offered."""
        if self.reason is None:
            return None
        demand = Demand(local_only=self.demand.local_only, priority=self.demand.priority)
        return Route(chain=self.reason, demand=demand, rung=self.rung)


class Router:
    """Finds the route of a wish, and the order of its targets.

    Args:
        fleet: its snapshot.
        slots: how loaded deployments are.
        circuits: which targets failed lately; told by who tries them.
        ladder: the configured one; without one, whoever has the capability may answer.
        cloud: cloud models; None for none.
        classify: says the effort of a request that leaves it open.
        now_s: the clock of the circuits.
    """

    def __init__(
        self,
        *,
        fleet: FleetPort,
        slots: Slots,
        circuits: Circuits,
        ladder: Ladder | None = None,
        cloud: CloudModels | None = None,
        classify: Callable[[Wish], Judged],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet = fleet
        self._slots = slots
        self._circuits = circuits
        self._ladder = ladder or _NO_LADDER
        self._cloud = cloud
        self._cloud_candidates = cloud.candidates if cloud is not None else {}
        self._classify = classify
        self._now_s = now_s
        self._passing = Passing(
            load=slots.load,
            pressure=slots.pressure,
            full=slots.full,
            left_alone=lambda: circuits.left_alone(now_s()) if circuits else (),
            allows=self._allows,
            refusal=self._refusal,
        )
        # A caller who names a model is never sent elsewhere: the only target is tried however it fared.
        self._passing_named = replace(
            self._passing,
            left_alone=lambda: (),
            allows=lambda target_id: not self._cloud_refusal(target_id),
            refusal=self._cloud_refusal,
        )
        self._view = fleet.view
        self._groups: dict[str, Group] = {}
        self._chains: dict[tuple[str, str, frozenset[str], bool], Chain] = {}

    def route(self, wish: Wish) -> Route:
        """The route of a wish.

        Raises:
            InvalidRequestError: an effort out of range, a name of ours that there is not, or one that cannot
                do this kind of job.
            UnknownModelError: there is no model of that name, or none for this kind of job.
        """
        if wish.model in self._look().by_model:
            # The usual case on the path of every request: a model by its name.
            return self._named(wish)
        head = _head(wish)
        effort = wish.effort if wish.effort is not None else head.effort
        asking = read_asking(wish.model, effort, head.reasoning_effort, self._ladder.chains)
        if asking.what is Asked.MODEL:
            return self._named(wish)
        demand = self._demand(wish, head)
        if asking.what is Asked.CHAIN:
            chain = self._chain("chain", asking.name, self._ladder.chains[asking.name], demand)
            return Route(chain=chain, demand=demand, why=f"the chain {asking.name} was asked for")
        return self._on_ladder(wish, asking, demand)

    def leaves_open(self, wish: Wish) -> bool:
        """Whether it is for us to say how much effort a wish is worth. Raises as `route`."""
        if wish.model in self._look().by_model or not self._ladder.rungs:
            return False
        head = _head(wish)
        asking = read_asking(wish.model, head.effort, head.reasoning_effort, self._ladder.chains)
        return asking.what is Asked.EFFORT and asking.effort is None

    def choose(self, route: Route) -> Iterator[Candidate]:
        """The targets to try, best first; one after the other, so that the later ones cost nothing.

        Raises:
            NoTargetError: there is none, for the reasons that it names.
        """
        chosen = choose(route.chain, route.demand, self._passing_of(route))
        first = next(chosen, None)
        if first is None:
            why = refusals(route.chain, route.demand, self._passing_of(route))
            raise NoTargetError(f"nothing can answer now: {why}" if why else "nothing can answer: no target")
        yield first
        yield from chosen

    def is_ready(self, candidate: Candidate) -> bool:
        """Whether a target would answer at once."""
        return candidate.rank == 0 and candidate.id not in self._slots.full

    def explain(self, wish: Wish) -> RouteExplanation:
        """Who would answer, and why each other one would not. Raises as `route`."""
        route = self.route(wish)
        considered = explain(route.chain, route.demand, self._passing_of(route))
        taken = next((each.target for each in considered if each.taken), "")
        reasoning = route.reasoning()
        reason = explain(reasoning.chain, reasoning.demand, self._passing_of(reasoning)) if reasoning else ()
        return RouteExplanation(
            considered=considered,
            target=taken,
            effort=route.effort,
            rung=route.rung,
            why=route.why,
            reason=reason,
        )

    def models(self) -> tuple[Model, ...]:
        """What a request may ask for: models of deployments, models of the cloud, and names of ours."""
        cloud = [
            Model(
                id=name,
                deployments=(),
                ready=not self._cloud_refusal(found.id),
                context_tokens=found.context_tokens,
                capabilities=tuple(sorted(found.capabilities)),
            )
            for name, found in self._cloud_candidates.items()
        ]
        names = (
            [AUTO_MODEL, *(OWN_PREFIX + name for name in self._ladder.chains)] if self._ladder.rungs else []
        )
        own = [Model(id=name, deployments=(), ready=True) for name in names]
        return (*models(self._look()), *cloud, *own)

    def _passing_of(self, route: Route) -> Passing:
        named_one = not route.rung and len(route.chain.groups) == 1 and len(route.chain.groups[0]) == 1
        return self._passing_named if named_one else self._passing

    def _named(self, wish: Wish) -> Route:
        policy = wish.policy
        wanted = _PICTURES if wish.kind is JobKind.CHAT and has_images(wish.body) else _NOTHING
        demand = Demand(
            local_only=policy.local_only, priority=policy.priority, prefers_awake=wanted is _PICTURES
        )
        key = (wish.kind, wish.model, wanted, policy.local_only)
        chain = self._chains.get(key)
        if chain is None:
            chain = self._chains[key] = chain_of([self._able(wish, wanted)], demand)
        return Route(chain=chain, demand=demand)

    def _able(self, wish: Wish, also: frozenset[str]) -> Group:
        """The targets of the name in a wish that can do its kind of job and more, as far as anybody knows.

        Raises:
            UnknownModelError: there is no such name.
            InvalidRequestError: none of them can.
        """
        group, wanted = self._group(wish.model), also | {_CAPABILITIES[wish.kind]}
        able = [each for each in group if wanted <= each.capabilities or not each.capabilities_known]
        if not able:
            can = frozenset[str]().union(*(each.capabilities for each in group))
            missing = ", ".join(sorted(wanted - can or wanted))
            raise InvalidRequestError(
                f"{wish.model} cannot do {missing}; as configured it can do "
                f"{', '.join(sorted(can)) or 'nothing'}",
                model=wish.model,
            )
        return able

    def _on_ladder(self, wish: Wish, asking: Asking, demand: Demand) -> Route:
        modality = _MODALITIES[wish.kind]
        if modality is Modality.CHAT and _VISION in demand.capabilities:
            modality = Modality.VISION if Modality.VISION in self._ladder.modalities else modality
        if modality not in self._ladder.modalities:
            return self._capable(wish, demand)
        if asking.effort is None:
            judged = self._classify(wish)
        else:
            judged = Judged(asking.effort, wish.effort_why or "the caller asked for it")
        rung = self._ladder.rung(modality, judged.effort)
        assert rung is not None  # a modality of the ladder has all efforts
        reason = None
        if rung.reason_chain:
            reason = self._chain(
                "reason", rung.name, rung.reason_chain, replace(demand, capabilities=_NOTHING)
            )
        if rung.capabilities:
            demand = replace(demand, capabilities=demand.capabilities | rung.capabilities)
        return Route(
            chain=self._chain("rung", rung.name, rung.chain, demand),
            demand=demand,
            effort=judged.effort,
            rung=rung.name,
            reason=reason,
            why=judged.why,
        )

    def _capable(self, wish: Wish, demand: Demand) -> Route:
        """Without a ladder: whoever can do it, nearest and idlest first."""
        wanted = _CAPABILITIES[wish.kind]
        # What takes pictures says so; whether tools are understood is left to the engine.
        demand = replace(demand, capabilities=demand.capabilities & _PICTURES, context_tokens=0)
        key = ("capability", wanted, demand.capabilities, demand.local_only)
        chain = self._chains.get(key)
        if chain is None:
            views = self._view.deployments.values()
            able = demand.capabilities | {wanted}
            found = [candidate_of(each) for each in views if able <= set(each.deployment.spec.capabilities)]
            chain = self._chains[key] = chain_of((found,), demand)
        if not chain.groups[0]:
            able_to = " and ".join(sorted(demand.capabilities | {wanted}))
            there = "`rung models` lists what there is" if self._view.deployments else _NOTHING_DEPLOYED
            raise UnknownModelError(f"no deployment can do {able_to}; {there}", model=wish.model)
        return Route(chain=chain, demand=demand)

    def _demand(self, wish: Wish, head: RequestHead) -> Demand:
        capabilities = set()
        text_bytes, picture_tokens = len(wish.body), 0
        if head.has_tools:
            capabilities.add("tools")
        if has_images(wish.body):
            capabilities.add(_VISION)
            text_bytes -= picture_bytes(wish.body)
            picture_tokens = count_images(wish.body) * _TOKENS_PER_IMAGE
        tokens = text_bytes // _BYTES_PER_TOKEN + picture_tokens
        return Demand(
            capabilities=frozenset(capabilities),
            context_tokens=tokens if wish.kind is JobKind.CHAT else 0,
            local_only=wish.policy.local_only,
            priority=wish.policy.priority,
            prefers_awake=_VISION in capabilities,
        )

    def _chain(self, kind: str, name: str, targets: Sequence[str], demand: Demand) -> Chain:
        """A chain made ready once for a snapshot; `kind` and `name` say which."""
        key = (kind, name, demand.capabilities, demand.local_only)
        chain = self._chains.get(key)
        if chain is None:
            chain = self._chains[key] = chain_of([self._entry(target) for target in targets], demand)
        return chain

    def _entry(self, name: str) -> Group:
        try:
            return self._group(name)
        except UnknownModelError:
            kind = TargetKind.BURST if name.startswith(BURST_PREFIX) else TargetKind.DEPLOYMENT
            missing = Candidate(id=name, kind=kind, owned=False, refusal="there is no such target now")
            self._groups[name] = (missing,)
            return (missing,)

    def _group(self, name: str) -> Group:
        """The targets of a name: a deployment, a model, `node/model`, a cloud model.

        Raises:
            UnknownModelError: there is none.
        """
        group = self._groups.get(name)
        if group is not None:
            return group
        placed = self._view.by_model.get(name)
        if placed is None:
            node, _, model = name.partition("/")
            placed = tuple(each for each in self._view.by_model.get(model, ()) if each.node.id == node)
        if placed:
            group = tuple(candidate_of(each) for each in placed)
        elif name in self._cloud_candidates:
            group = (self._cloud_candidates[name],)
        else:
            views = self._view.deployments.values()
            names = sorted({each.deployment.spec.model for each in views} | set(self._cloud_candidates))
            more = f" and {len(names) - _NAMES_TOLD} more" if len(names) > _NAMES_TOLD else ""
            told = f"there are {', '.join(names[:_NAMES_TOLD])}{more}; {AUTO_MODEL} leaves the choice to Rung"
            there = told if names else _NOTHING_DEPLOYED
            raise UnknownModelError(f"there is no model {name!r}; {there}", model=name)
        self._groups[name] = group
        return group

    def _look(self) -> FleetView:
        """The snapshot of now; what was made of an older one is forgotten."""
        view = self._fleet.view
        if view is not self._view:
            self._view = view
            self._groups = {}
            self._chains = {}
        return view

    def _allows(self, target_id: str) -> bool:
        if self._circuits and not self._circuits.allows(target_id, self._now_s()):
            return False
        return not self._cloud_refusal(target_id)

    def _refusal(self, target_id: str) -> str:
        refusal = self._circuits.refusal(target_id, self._now_s()) if self._circuits else ""
        return refusal or self._cloud_refusal(target_id)

    def _cloud_refusal(self, target_id: str) -> str:
        if self._cloud is None or target_id not in self._cloud_candidates:
            return ""
        return self._cloud.refusal(target_id)


def _head(wish: Wish) -> RequestHead:
    """What of a request's body decides where it goes. Raises InvalidRequestError."""
    return read_head(wish.body) if wish.input is None else RequestHead()
