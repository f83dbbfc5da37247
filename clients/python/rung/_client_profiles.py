"""Profiles: what there are, and switching to one."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from rung import codec, v1
from rung._client_calls import Connection, Reconnect
from rung.errors import UnavailableError
from rung.types import ProfileDone, ProfileEvent, ProfileFailed, ProfileList, ProfilePlan


async def list_profiles(connection: Connection) -> ProfileList:
    """The profiles, and which is current."""
    response = await connection.unary(connection.stubs.fleet.ListProfiles, v1.ListProfilesRequest())
    return codec.profile_list_from_proto(response)


async def switch(
    connection: Connection, request: v1.SwitchProfileRequest
) -> AsyncGenerator[ProfileEvent, None]:
    """The events of a switch to its last one.

    A lost connection is made again and the switch joined. A control plane that was killed meanwhile begins it
    anew, from how things are by then: its events are told from the plan on.
    """
    reconnect = Reconnect(connection.reconnect_s)
    first: ProfileEvent | None = None
    last_sequence = 0
    while True:
        try:
            responses = connection.stream(connection.stubs.fleet.SwitchProfile, request)
            async with aclosing(responses):
                async for response in responses:
                    reconnect.connected()
                    event = codec.profile_event_from_proto(response.event)
                    if event.sequence == 1 and event != first:
                        first, last_sequence = event, 0
                    ended = isinstance(event.payload, ProfileDone | ProfileFailed)
                    ended = ended or (request.dry_run and isinstance(event.payload, ProfilePlan))
                    if event.sequence > last_sequence:
                        last_sequence = event.sequence
                        yield event
                    if ended:
                        return
            raise UnavailableError("the stream of the switch ended before its last event")
        except UnavailableError as lost:
            await reconnect.pause(lost)
