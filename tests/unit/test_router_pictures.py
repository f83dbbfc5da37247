"""Where a picture in a chat request may go, and where it is refused before anybody is asked."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.fleet import build_view
from rung.errors import InvalidRequestError, NoTargetError, UnknownModelError
from rung.types import Residency
from tests.fakes.agent_server import a_deployment
from tests.unit.test_router import NODES, PICTURE, APlace, spec, wish


@pytest.mark.parametrize("model", ["nemotron", "qwen", "deepseek/chat", "deepseek-r1"])
def test_a_named_model_that_does_not_see_refuses_it(model: str) -> None:
    place = APlace()
    assert place.targets(wish(model))
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match=f"^{model} cannot do vision; as configured it can do"):
            place.router.route(wish(model, content=PICTURE))


@pytest.mark.parametrize(("model", "target"), [("qwen-vl", "eyes"), ("vision-large", "openai/vision")])
def test_a_named_model_that_sees_takes_it(model: str, target: str) -> None:
    assert APlace().targets(wish(model, content=PICTURE)) == [target]


def test_a_text_that_speaks_of_pictures_shows_none() -> None:
    assert APlace().targets(wish("nemotron", content='send me an "image_url": {}')) == ["orchestrator"]


def test_of_what_was_found_running_nobody_knows_so_it_is_asked() -> None:
    place = APlace()
    adopted = a_deployment(spec("found", "spark", "mystery"), Residency.AWAKE)
    adopted = replace(adopted, spec=replace(adopted.spec, capabilities=()))
    place.fleet.view = build_view(NODES, [], {"spark": {"found": adopted}}, "")
    assert place.targets(wish("mystery", content=PICTURE)) == ["spark/found"]


def test_a_private_picture_stays_on_hardware_of_ours_and_has_it_started() -> None:
    place = APlace(eyes=Residency.STOPPED)
    assert place.targets(wish(effort=3, content=PICTURE, local_only=True)) == ["eyes"]
    assert place.targets(wish(effort=3, content=PICTURE)) == ["eyes", "openai/vision"]
    with pytest.raises(NoTargetError, match="not hardware of ours"):
        place.targets(wish("vision-large", content=PICTURE, local_only=True))


def test_it_prefers_what_is_awake_and_a_text_does_not() -> None:
    router = APlace().router
    assert router.route(wish(effort=3, content=PICTURE)).demand.prefers_awake
    assert router.route(wish("qwen-vl", content=PICTURE)).demand.prefers_awake
    assert not router.route(wish(effort=3)).demand.prefers_awake


def test_each_picture_counts_among_the_tokens() -> None:
    router = APlace().router
    one, four = (router.route(wish(effort=3, content=PICTURE * count)).demand for count in (1, 4))
    assert four.context_tokens - one.context_tokens == pytest.approx(3 * 256, abs=100)


def test_without_a_ladder_one_that_sees_answers() -> None:
    assert APlace(ladder=False).targets(wish(content=PICTURE)) == ["eyes"]


def test_without_a_ladder_and_without_eyes_it_is_said_that_nobody_sees() -> None:
    place = APlace(ladder=False)
    blind: dict[str, Any] = {"spark": {"talks": a_deployment(spec("talks", "spark", "q"), Residency.AWAKE)}}
    place.fleet.view = build_view(NODES, [spec("talks", "spark", "q")], blind, "")
    with pytest.raises(UnknownModelError, match="no deployment can do chat and vision"):
        place.router.route(wish(content=PICTURE))
