"""From a wish to those who may answer it, on a small fleet: a workstation, a Spark, a rented box, a cloud."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.fleet import FleetView, build_view
from controlplane.ladder import (
    Candidate,
    Circuits,
    Ladder,
    Modality,
    RungSpec,
    TargetKind,
    build_ladder,
)
from controlplane.pipelines import Slots
from controlplane.pipelines._router import Judged, Route, Router
from controlplane.pipelines._wish import Wish
from rung.errors import InvalidRequestError, NoTargetError, UnknownModelError
from rung.types import (
    Deployment,
    DeploymentSpec,
    JobKind,
    Node,
    NodeOwnership,
    NodeState,
    Policy,
    Priority,
    Residency,
)
from tests.fakes.agent_server import a_deployment, a_spec

NODES = {
    name: Node(id=name, address="x", state=NodeState.READY, ownership=ownership, last_seen_time_s=1.0)
    for name, ownership in (
        ("workstation", NodeOwnership.OWNED),
        ("spark", NodeOwnership.OWNED),
        ("rented", NodeOwnership.RENTED),
    )
}


def spec(
    name: str, node: str, model: str, *capabilities: str, context_tokens: int = 0, alias: str = ""
) -> DeploymentSpec:
    aliases = (alias,) if alias else ()
    return replace(
        a_spec(name, node_id=node, model=model, aliases=aliases),
        capabilities=capabilities or ("chat",),
        context_tokens=context_tokens,
        slots=2,
    )


SPECS = (
    spec("orchestrator", "workstation", "nemotron", "chat", "tools", context_tokens=8000, alias="small"),
    spec("thinker", "workstation", "deepseek-r1"),
    spec("spark-qwen", "spark", "qwen", "chat", "tools", context_tokens=100_000),
    spec("rented-qwen", "rented", "qwen", "chat", "tools"),
    spec("eyes", "spark", "qwen-vl", "chat", "vision"),
    spec("embed", "workstation", "bge", "embedding"),
)

CHAINS = {
    "quick": ["orchestrator", "@reasoning"],
    "reasoning": ["spark/qwen", "thinker", "burst/reasoning", "rented/qwen", "deepseek/chat"],
    "seeing": ["eyes", "vision-large"],
    "embedding": ["bge"],
    "pinned": ["thinker"],
}

RUNGS = (
    RungSpec(name="easy", min_effort=1, max_effort=6, chain="quick"),
    RungSpec(name="hard", min_effort=7, max_effort=10, chain="quick", reason="reasoning"),
    RungSpec(name="seeing", modality=Modality.VISION, capabilities=("vision",), chain="seeing"),
    RungSpec(name="vectors", modality=Modality.EMBEDDING, chain="embedding"),
)


class AFleet:
    """A snapshot that a test replaces."""

    def __init__(self, **residencies: Residency) -> None:
        self.residencies = {each.id: Residency.AWAKE for each in SPECS} | {
            name.replace("_", "-"): residency for name, residency in residencies.items()
        }
        self.nodes = dict(NODES)
        self.old: set[str] = set()
        self.reported: dict[str, Deployment] = {}
        self.view = FleetView()
        self.renew()

    def shows(self, name: str, deployment: Deployment) -> None:
        """Report a deployment so from now on."""
        self.reported[name] = deployment
        self.renew()

    def renew(self) -> None:
        reported: dict[str, dict[str, Deployment]] = {name: {} for name in self.nodes}
        for each in SPECS:
            found = self.reported.get(each.id) or a_deployment(each, self.residencies[each.id])
            reported[each.node_id][each.id] = found
        self.view = build_view(self.nodes, SPECS, reported, "", old=self.old)


class ACloud:
    """Two cloud models, one of them by an alias."""

    def __init__(self) -> None:
        chat = Candidate(
            id="deepseek/chat",
            kind=TargetKind.CLOUD,
            owned=False,
            capabilities=frozenset({"chat", "tools"}),
            usd_per_million_tokens=1.1,
        )
        vision = replace(chat, id="openai/vision", capabilities=frozenset({"chat", "tools", "vision"}))
        self.refused: dict[str, str] = {}
        self._candidates = {chat.id: chat, vision.id: vision, "vision-large": vision}

    @property
    def candidates(self) -> Mapping[str, Candidate]:
        return self._candidates

    def refusal(self, target_id: str) -> str:
        return self.refused.get(target_id, "")


class APlace:
    """A router, and what it reads."""

    def __init__(self, *, ladder: bool = True, cloud: bool = True, **residencies: Residency) -> None:
        self.fleet = AFleet(**residencies)
        self.slots = Slots()
        self.circuits = Circuits(jitter=lambda: 1.0)
        self.cloud = ACloud()
        self.now_s = 1000.0
        self.judged: list[bytes] = []
        self.router = Router(
            fleet=self.fleet,
            slots=self.slots,
            circuits=self.circuits,
            ladder=self.a_ladder() if ladder else None,
            cloud=self.cloud if cloud else None,
            classify=self._classify,
            now_s=lambda: self.now_s,
        )

    @staticmethod
    def a_ladder() -> Ladder:
        return build_ladder(RUNGS, CHAINS)

    def _classify(self, wish: Wish) -> Judged:
        self.judged.append(wish.body)
        return Judged(8, "it looked hard")

    def targets(self, wish: Wish) -> list[str]:
        return [each.id for each in self.router.choose(self.router.route(wish))]

    def breaks(self, target: str) -> None:
        for _ in range(3):
            self.circuits.failed(target, self.now_s, "HTTP 503")


def wish(
    model: str = "",
    *,
    kind: JobKind = JobKind.CHAT,
    effort: int | None = None,
    local_only: bool = False,
    priority: Priority = Priority.AGENT,
    content: Any = "Hi",
    tools: Any = None,
    said: Mapping[str, Any] = {},
) -> Wish:
    body = {"messages": [{"role": "user", "content": content}], "tools": tools, **said}
    return Wish(
        kind=kind,
        model=model,
        body=json.dumps(body).encode(),
        effort=effort,
        policy=Policy(local_only=local_only, priority=priority),
    )


TOOL = {"type": "function", "function": {"name": "look"}}
PICTURE = [{"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}]

EASY = ["orchestrator", "spark-qwen", "thinker", "rented-qwen", "deepseek/chat"]


class TestNames:
    @pytest.mark.parametrize(
        ("model", "targets"),
        [
            ("nemotron", ["orchestrator"]),
            ("small", ["orchestrator"]),
            ("orchestrator", ["orchestrator"]),
            ("qwen", ["spark-qwen", "rented-qwen"]),
            ("rented/qwen", ["rented-qwen"]),
            ("spark/qwen", ["spark-qwen"]),
            ("deepseek/chat", ["deepseek/chat"]),
            ("vision-large", ["openai/vision"]),
        ],
    )
    def test_a_model_is_answered_by_those_who_serve_it_and_by_nobody_else(
        self, model: str, targets: list[str]
    ) -> None:
        place = APlace()
        assert place.targets(wish(model)) == targets
        route = place.router.route(wish(model))
        assert (route.effort, route.rung, route.reason) == (0, "", None)
        assert place.judged == []

    @pytest.mark.parametrize("model", ["gpt-5", "workstation/qwen", "spark/"])
    def test_one_that_nobody_serves_is_refused_with_what_there_is(self, model: str) -> None:
        with pytest.raises(UnknownModelError, match="there are bge, deepseek-r1, deepseek/chat") as refused:
            APlace().router.route(wish(model))
        assert refused.value.message.endswith("; rung/auto leaves the choice to Rung")

    def test_a_model_that_is_away_is_not_replaced(self) -> None:
        place = APlace()
        place.fleet.nodes["workstation"] = replace(
            NODES["workstation"], state=NodeState.UNREACHABLE, detail="no route"
        )
        place.fleet.renew()
        with pytest.raises(NoTargetError) as refused:
            place.targets(wish("nemotron"))
        assert refused.value.message == (
            "nothing can answer now: orchestrator: its node workstation is unreachable (no route)"
        )

    def test_the_only_one_who_serves_it_is_tried_although_it_failed_and_others_are_preferred(self) -> None:
        place = APlace()
        place.breaks("orchestrator")
        place.breaks("spark-qwen")
        assert place.targets(wish("nemotron")) == ["orchestrator"]
        assert place.targets(wish("qwen")) == ["rented-qwen"]

    def test_a_cloud_model_without_money_left_is_not_tried(self) -> None:
        place = APlace()
        place.cloud.refused["deepseek/chat"] = "today's $5 are spent"
        with pytest.raises(NoTargetError, match=r"deepseek/chat: today's \$5 are spent"):
            place.targets(wish("deepseek/chat"))


class TestKinds:
    @pytest.mark.parametrize(
        ("model", "kind", "can"),
        [
            ("nemotron", JobKind.EMBEDDING, "cannot do embedding; as configured it can do chat, tools"),
            ("spark/qwen", JobKind.EMBEDDING, "cannot do embedding; as configured it can do chat, tools"),
            ("deepseek/chat", JobKind.EMBEDDING, "cannot do embedding; as configured it can do chat, tools"),
            ("bge", JobKind.CHAT, "cannot do chat; as configured it can do embedding"),
        ],
    )
    def test_what_a_model_cannot_do_is_refused_with_what_it_can(
        self, model: str, kind: JobKind, can: str
    ) -> None:
        router = APlace().router
        other = JobKind.CHAT if kind is JobKind.EMBEDDING else JobKind.EMBEDDING
        assert router.route(wish(model, kind=other)).chain.ids
        for _ in range(2):
            with pytest.raises(InvalidRequestError) as refused:
                router.route(wish(model, kind=kind))
            assert refused.value.message == f"{model} {can}"

    @pytest.mark.parametrize("capabilities", [("chat",), ()])
    def test_what_was_found_running_is_asked_since_nobody_said_what_it_can(
        self, capabilities: tuple[str, ...]
    ) -> None:
        place = APlace()
        adopted = a_deployment(spec("found", "spark", "mystery"), Residency.AWAKE)
        adopted = replace(adopted, spec=replace(adopted.spec, capabilities=capabilities))
        place.fleet.view = build_view(NODES, [], {"spark": {"found": adopted}}, "")
        assert place.targets(wish("mystery", kind=JobKind.EMBEDDING)) == ["spark/found"]


class TestWaits:
    def test_one_that_sleeps_says_how_long_it_takes(self) -> None:
        place = APlace(orchestrator=Residency.ASLEEP, thinker=Residency.STOPPED)
        asleep = a_deployment(SPECS[0], Residency.ASLEEP)
        place.fleet.shows("orchestrator", replace(asleep, awake_expected_s=6.2))
        found = {each.target: each for each in place.router.explain(wish(effort=3)).considered}
        orchestrator, thinker = found["orchestrator"], found["thinker"]
        assert orchestrator.expected_wait_s == 6.2
        assert orchestrator.reason.startswith("asleep on workstation; awake in about 6 s, 0 of 2 slots")
        assert thinker.expected_wait_s is None
        assert thinker.reason.startswith("stopped on workstation; it would be started or woken first")

    def test_where_nothing_is_measured_any_more_nothing_is_taken_for_idle(self) -> None:
        place = APlace()
        place.fleet.old = {"spark"}
        place.fleet.renew()
        assert place.targets(wish("qwen")) == ["rented-qwen", "spark-qwen"]
        assert place.targets(wish("rung/reasoning"))[:2] == ["thinker", "spark-qwen"]
        explained = place.router.explain(wish("spark-qwen"))
        [candidate] = place.router.route(wish("spark-qwen")).chain.fit.values()
        assert not place.router.is_ready(candidate)
        assert explained.target == "spark-qwen"
        [considered] = explained.considered
        assert considered.expected_wait_s is None
        assert considered.reason.startswith(
            "awake on spark; not known for sure, since its node has measured nothing for a while"
        )


class TestEffort:
    @pytest.mark.parametrize(
        ("model", "effort", "said", "expected"),
        [
            ("rung/6", None, {}, (6, "easy", False)),
            ("rung/7", None, {}, (7, "hard", True)),
            ("", 6, {}, (6, "easy", False)),
            ("rung/auto", 7, {}, (7, "hard", True)),
            ("", None, {"effort": 3}, (3, "easy", False)),
            ("", 8, {"effort": 3}, (8, "hard", True)),
            ("", None, {"reasoning_effort": "medium"}, (6, "easy", False)),
            ("", None, {"reasoning_effort": "high"}, (8, "hard", True)),
            ("", None, {}, (8, "hard", True)),
        ],
    )
    def test_it_decides_the_rung_and_whether_there_is_a_reason_tool(
        self, model: str, effort: int | None, said: dict[str, Any], expected: tuple[int, str, bool]
    ) -> None:
        place = APlace()
        route = place.router.route(wish(model, effort=effort, said=said))
        assert (route.effort, route.rung, route.reason is not None) == expected
        assert place.targets(wish(model, effort=effort, said=said)) == EASY

    def test_only_a_request_that_leaves_it_open_is_judged(self) -> None:
        place = APlace()
        open_wish = wish()
        assert place.router.route(open_wish).why == "it looked hard"
        assert place.judged == [open_wish.body]
        assert place.router.route(wish(effort=2)).why == "the caller asked for it"
        assert len(place.judged) == 1

    @pytest.mark.parametrize("effort", [0, 11])
    def test_out_of_range_is_refused(self, effort: int) -> None:
        with pytest.raises(InvalidRequestError, match="must be 1 to 10"):
            APlace().router.route(wish(effort=effort))

    def test_the_reasoners_need_not_do_what_the_request_needs(self) -> None:
        route = APlace().router.route(wish(effort=8, tools=[TOOL]))
        assert route.reason is not None
        assert route.reason.ids == ("spark-qwen", "thinker", "rented-qwen", "deepseek/chat")
        assert "thinker" not in route.chain.ids


class TestChains:
    def test_one_is_asked_for_by_its_name(self) -> None:
        place = APlace()
        assert place.targets(wish("rung/reasoning")) == EASY[1:]
        route = place.router.route(wish("rung/reasoning"))
        assert (route.effort, route.rung, route.why) == (0, "", "the chain reasoning was asked for")

    def test_one_that_there_is_not_is_refused(self) -> None:
        with pytest.raises(InvalidRequestError, match="there is no model 'rung/coding'"):
            APlace().router.route(wish("rung/coding"))

    def test_what_is_not_there_is_passed_over_and_said_so(self) -> None:
        place = APlace()
        explained = place.router.explain(wish("rung/reasoning"))
        assert {each.target: each.reason for each in explained.considered}["burst/reasoning"] == (
            "there is no such target now"
        )

    def test_a_target_that_failed_is_left_alone_until_its_time(self) -> None:
        place = APlace()
        place.breaks("orchestrator")
        assert place.targets(wish(effort=3)) == EASY[1:]
        place.now_s += 2.0
        assert place.targets(wish(effort=3)) == EASY

    def test_a_full_one_gives_way(self) -> None:
        place = APlace()
        for _ in range(2):
            assert place.slots.try_acquire("orchestrator", 2)
        assert place.targets(wish(effort=3)) == [
            "spark-qwen",
            "thinker",
            "orchestrator",
            "rented-qwen",
            "deepseek/chat",
        ]
        place.slots.release("orchestrator")
        assert place.targets(wish(effort=3)) == EASY

    def test_a_newer_snapshot_counts_at_once(self) -> None:
        place = APlace()
        assert place.targets(wish(effort=3))[0] == "orchestrator"
        place.fleet.nodes["workstation"] = replace(NODES["workstation"], state=NodeState.UNREACHABLE)
        place.fleet.renew()
        assert place.targets(wish(effort=3)) == ["spark-qwen", "rented-qwen", "deepseek/chat"]

    def test_nobody_left_is_told_target_by_target(self) -> None:
        place = APlace(cloud=False)
        for name in NODES:
            place.fleet.nodes[name] = replace(NODES[name], state=NodeState.UNREACHABLE)
        place.fleet.renew()
        with pytest.raises(NoTargetError) as refused:
            place.targets(wish(effort=3))
        for target in (
            "orchestrator",
            "spark-qwen",
            "thinker",
            "burst/reasoning",
            "rented-qwen",
            "deepseek/chat",
        ):
            assert f"{target}: " in refused.value.message


class TestNeeds:
    def test_tools(self) -> None:
        assert APlace().targets(wish(effort=3, tools=[TOOL])) == [
            "orchestrator",
            "spark-qwen",
            "rented-qwen",
            "deepseek/chat",
        ]

    @pytest.mark.parametrize("none", [None, []])
    def test_no_tools_are_no_need(self, none: object) -> None:
        assert APlace().targets(wish(effort=3, tools=none)) == EASY

    def test_a_picture_goes_to_the_rung_of_vision(self) -> None:
        place = APlace()
        assert place.router.route(wish(effort=3, content=PICTURE)).rung == "seeing"
        assert place.targets(wish(effort=3, content=PICTURE)) == ["eyes", "openai/vision"]

    def test_a_picture_with_tools_needs_both(self) -> None:
        assert APlace().targets(wish(effort=3, content=PICTURE, tools=[TOOL])) == ["openai/vision"]

    def test_what_a_rung_promises_each_of_its_targets_must_have(self) -> None:
        place = APlace()
        ladder = build_ladder([RungSpec(name="all", capabilities=("tools",), chain="quick")], CHAINS)
        router = Router(
            fleet=place.fleet,
            slots=place.slots,
            circuits=place.circuits,
            ladder=ladder,
            classify=lambda _: Judged(3),
        )
        assert [each.id for each in router.choose(router.route(wish()))] == [
            "orchestrator",
            "spark-qwen",
            "rented-qwen",
        ]

    def test_a_long_request_passes_over_those_with_a_short_context(self) -> None:
        long = "word " * 10_000
        assert APlace().targets(wish(effort=3, content=long))[0] == "spark-qwen"
        assert APlace().targets(wish(effort=3, content="word"))[0] == "orchestrator"

    def test_a_picture_in_the_request_itself_is_not_taken_for_a_long_text(self) -> None:
        data = base64.b64encode(bytes(3_000_000)).decode()
        picture = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}]
        demand = APlace().router.route(wish(effort=3, content=picture)).demand
        assert demand.capabilities == {"vision"}
        assert 256 <= demand.context_tokens < 356

    def test_embeddings_have_a_rung_of_their_own(self) -> None:
        place = APlace()
        route = place.router.route(wish(kind=JobKind.EMBEDDING, effort=9))
        assert (route.rung, route.reason) == ("vectors", None)
        assert place.targets(wish("bge", kind=JobKind.EMBEDDING)) == ["embed"]
        assert place.targets(wish(kind=JobKind.EMBEDDING)) == ["embed"]


class TestLocalOnly:
    @pytest.mark.parametrize("model", ["", "rung/3", "rung/reasoning", "qwen"])
    def test_only_hardware_of_ours_answers(self, model: str) -> None:
        targets = APlace().targets(wish(model, effort=3 if not model else None, local_only=True))
        assert targets
        assert set(targets) <= {"orchestrator", "spark-qwen", "thinker"}

    @pytest.mark.parametrize("model", ["rented/qwen", "deepseek/chat", "vision-large"])
    def test_one_that_is_named_and_is_not_ours_is_refused(self, model: str) -> None:
        with pytest.raises(
            NoTargetError, match="the request is local_only, and this is not hardware of ours"
        ):
            APlace().targets(wish(model, local_only=True))

    def test_nor_do_the_reasoners_leave_it(self) -> None:
        route = APlace().router.route(wish(effort=8, local_only=True))
        assert route.reason is not None
        assert route.reason.ids == ("spark-qwen", "thinker")
        assert route.demand.local_only

    def test_it_holds_for_the_same_wish_before_and_after_one_that_may_leave(self) -> None:
        place = APlace()
        for local_only in (True, False, True):
            assert ("deepseek/chat" in place.targets(wish(effort=3, local_only=local_only))) is not local_only


class TestWithoutLadder:
    def test_whoever_can_do_it_answers(self) -> None:
        place = APlace(ladder=False, orchestrator=Residency.ASLEEP, spark_qwen=Residency.STOPPED)
        assert place.targets(wish()) == ["thinker", "rented-qwen", "eyes", "orchestrator", "spark-qwen"]
        assert place.targets(wish(kind=JobKind.EMBEDDING)) == ["embed"]
        assert place.judged == []

    def test_nobody_can_do_it(self) -> None:
        place = APlace(ladder=False)
        place.fleet.view = FleetView()
        for _ in range(2):
            with pytest.raises(UnknownModelError, match="no deployment can do chat"):
                place.router.route(wish())

    def test_there_are_no_chains(self) -> None:
        with pytest.raises(InvalidRequestError, match="there is no model 'rung/reasoning'"):
            APlace(ladder=False).router.route(wish("rung/reasoning"))


class TestExplain:
    def test_effort_rung_and_everybody(self) -> None:
        place = APlace(thinker=Residency.ASLEEP)
        place.breaks("spark-qwen")
        explained = place.router.explain(wish(effort=8, tools=[TOOL]))
        assert (explained.target, explained.effort, explained.rung) == ("orchestrator", 8, "hard")
        assert [(each.target, each.taken) for each in explained.considered] == [
            ("orchestrator", True),
            ("rented-qwen", False),
            ("deepseek/chat", False),
            ("spark-qwen", False),
            ("thinker", False),
            ("burst/reasoning", False),
        ]
        said = {each.target: each.reason for each in explained.considered}
        assert said["orchestrator"] == "awake on workstation, 0 of 2 slots taken, 0 waiting"
        assert said["spark-qwen"] == "it failed (HTTP 503); it is tried again in 2 s"
        assert said["thinker"] == "it cannot do tools"

    def test_how_the_effort_was_found_and_who_is_behind_the_reason_tool(self) -> None:
        explained = APlace().router.explain(wish(local_only=True, tools=[TOOL]))
        assert explained.why == "it looked hard"
        assert [(each.target, each.place) for each in explained.reason] == [
            ("spark-qwen", 1),
            ("thinker", 2),
            ("burst/reasoning", 0),
            ("rented-qwen", 0),
            ("deepseek/chat", 0),
        ]
        assert APlace().router.explain(wish(effort=6)).reason == ()

    def test_it_changes_nothing(self) -> None:
        place = APlace()
        place.breaks("orchestrator")
        place.now_s += 2.0
        for _ in range(2):
            assert place.router.explain(wish(effort=3)).target == "orchestrator"


def test_ready_is_awake_with_a_free_slot() -> None:
    place = APlace(thinker=Residency.ASLEEP)

    def ready(model: str) -> bool:
        route: Route = place.router.route(wish(model))
        return place.router.is_ready(next(place.router.choose(route)))

    assert ready("nemotron")
    assert ready("deepseek/chat")
    assert not ready("deepseek-r1")
    for _ in range(2):
        assert place.slots.try_acquire("orchestrator", 2)
    assert not ready("nemotron")
