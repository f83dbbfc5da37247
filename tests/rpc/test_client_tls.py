"""The client over TLS: who it trusts, who it says it is, and what it makes of bad files."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from rung import AsyncClient, TlsOptions, v1
from rung.cli import ExitCode, main
from rung.errors import InvalidRequestError, UnavailableError

TLS = Path(__file__).parent.parent / "data" / "tls"
#: Its own authority.
CERTIFICATE = str(TLS / "localhost.pem")
KEY = str(TLS / "localhost.key")


async def _list_models(
    request: v1.ListModelsRequest,
    context: grpc.aio.ServicerContext[v1.ListModelsRequest, v1.ListModelsResponse],
) -> v1.ListModelsResponse:
    """The token that was sent, as the only model."""
    sent = dict(context.invocation_metadata() or ())
    return v1.ListModelsResponse(models=[v1.Model(id=str(sent["authorization"]))])


@pytest.fixture(scope="module")
def credentials() -> grpc.ServerCredentials:
    """Of a server that talks to those alone who have a certificate."""
    certificate, key = Path(CERTIFICATE).read_bytes(), Path(KEY).read_bytes()
    return grpc.ssl_server_credentials([(key, certificate)], certificate, require_client_auth=True)


@pytest.fixture
async def address(credentials: grpc.ServerCredentials) -> AsyncIterator[str]:
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(
        _list_models,
        request_deserializer=v1.ListModelsRequest.FromString,
        response_serializer=v1.ListModelsResponse.SerializeToString,
    )
    service = "rung.v1.InferenceService"
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {"ListModels": handler})])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    yield f"localhost:{port}"
    await server.stop(None)


async def test_both_sides_show_their_certificates(address: str) -> None:
    tls = TlsOptions(authority_file=CERTIFICATE, certificate_file=CERTIFICATE, private_key_file=KEY)
    async with AsyncClient(address, tls=tls, token="s3cret") as client:
        (model,) = await client.list_models()
    assert model.id == "Bearer s3cret"


@pytest.mark.parametrize("tls", [None, TlsOptions(authority_file=CERTIFICATE)], ids=["plain", "nameless"])
async def test_who_shows_none_is_not_served(address: str, tls: TlsOptions | None) -> None:
    async with AsyncClient(address, tls=tls) as client:
        with pytest.raises(UnavailableError):
            await client.list_models()


@pytest.mark.parametrize("half", [{"certificate_file": CERTIFICATE}, {"private_key_file": KEY}])
def test_half_of_a_pair_is_refused(half: dict[str, str]) -> None:
    with pytest.raises(InvalidRequestError, match="together"):
        TlsOptions(**half)


def test_what_is_not_pem_is_wrong_usage_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tls-authority", str(TLS.parent / "effort_prompts.yaml"), "models"]) == ExitCode.USAGE
    assert "effort_prompts.yaml is not PEM" in capsys.readouterr().err
