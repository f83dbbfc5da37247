"""How large a request may be is bounded by what a control plane can send on."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlplane.config import load_config
from rung.errors import ConfigError
from rung.service import ServerOptions
from rung.transport import LARGEST_REQUEST_BYTES, MAX_MESSAGE_BYTES, ChannelOptions


def test_the_largest_request_that_can_be_set_fits_a_message(tmp_path: Path) -> None:
    path = tmp_path / "rung.yaml"
    path.write_text("server: {max_request_bytes: 63MiB}\n")
    assert load_config(path).server.max_request_bytes == LARGEST_REQUEST_BYTES
    path.write_text("server: {max_request_bytes: 64MiB}\n")
    with pytest.raises(
        ConfigError,
        match=r"rung\.yaml:1: server\.max_request_bytes: .*one message of 64 MiB at most: 63MiB is the most",
    ):
        load_config(path)


def test_a_server_that_takes_the_largest_request_takes_whatever_a_channel_sends() -> None:
    sent = dict(ChannelOptions(address="box:1").arguments())["grpc.max_send_message_length"]
    taken = dict(ServerOptions(port=0, max_request_bytes=MAX_MESSAGE_BYTES).arguments())
    assert sent <= taken["grpc.max_receive_message_length"]
    assert sent > LARGEST_REQUEST_BYTES
