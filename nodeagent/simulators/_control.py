"""What tests see of a simulated service, and switch: `GET /sim/state` and `POST /sim/faults`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
from aiohttp import web

from nodeagent.simulators._faults import Faults, parse_faults
from nodeagent.simulators._http import Counters, json_response


def add_control(
    app: web.Application,
    *,
    engine: str,
    counters: Counters,
    faults: Faults,
    state: Callable[[], Mapping[str, object]],
) -> None:
    """Add both routes; `state` is what this service tells beside its counters and faults."""

    async def show(http: web.Request) -> web.Response:
        known = {"simulated": True, "engine": engine, **state()}
        return json_response({**known, **msgspec.structs.asdict(counters), "faults": faults.names()})

    async def switch(http: web.Request) -> web.Response:
        try:
            wanted = msgspec.json.decode(await http.read(), type=dict[str, list[str]])
            faults.switch_to(parse_faults(wanted.get("faults", [])))
        except ValueError as error:
            return json_response({"error": str(error)}, status=400)
        return json_response({"faults": faults.names()})

    app.router.add_get("/sim/state", show)
    app.router.add_post("/sim/faults", switch)
