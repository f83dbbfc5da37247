"""What the adapters of speech have in common: transcripts off a stream, forms, WAV files, command lines."""

from __future__ import annotations

import email.policy
from collections.abc import AsyncIterator
from email.parser import BytesParser

import pytest

from nodeagent.engines import PiperAdapter, SpeachesAdapter, XttsAdapter
from nodeagent.engines._speech import is_silent, require_wav
from nodeagent.engines._transcript import TranscriptReader, read_text
from nodeagent.simulators._sound import silence, wav
from rung.errors import EngineFailedError, EngineProtocolError, InvalidRequestError
from rung.service import EngineClient, FormFile, form
from rung.types import DeploymentSpec, EngineSpec, ProcessRuntime, ServiceEngine

OPENAI = (
    b'data: {"type":"transcript.text.delta","delta":" The"}\n\n'
    b": a comment\n\n"
    b'data: {"type":"transcript.text.delta","delta":" end.","logprobs":null}\r\n\r\n'
    b'data: {"type":"transcript.text.done","text":" The end."}\n\n'
)
#: What older servers send.
OBJECTS = b'data: {"text":" The"}\n\ndata: {"text":" end."}\n\n'


def read(stream: bytes, step: int) -> str:
    reader = TranscriptReader("it")
    texts: list[str] = []
    for start in range(0, len(stream), step):
        texts += reader.feed(stream[start : start + step])
    return "".join([*texts, *reader.finish()])


@pytest.mark.parametrize("stream", [OPENAI, OBJECTS, OPENAI.rstrip()])
@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_text_is_the_same_however_its_stream_is_cut(stream: bytes, step: int) -> None:
    assert read(stream, step) == "The end."


def test_a_server_that_only_says_it_at_the_end_has_said_it() -> None:
    assert read(b'data: {"type":"transcript.text.done","text":" All of it."}\n\n', 5) == "All of it."


@pytest.mark.parametrize(
    ("stream", "error", "complaint"),
    [
        (OPENAI[: OPENAI.index(b"data: {", 90)], EngineProtocolError, "before its last event"),
        (b"data: [1]\n\n", EngineProtocolError, "no event of a transcription"),
        (b'data: {"text"\n\n', EngineProtocolError, "no event of a transcription"),
        (b'data: {"error":{"message":"no memory"}}\n\n', EngineFailedError, "no memory"),
    ],
)
def test_a_stream_that_is_not_whole_is_an_error(
    stream: bytes, error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        read(stream, 1000)


def test_whole_answers_are_json_or_text() -> None:
    assert read_text(b'{"text":" Hm. ","logprobs":null}', "application/json", "it") == "Hm."
    assert read_text(b" Hm.\n", "text/plain; charset=utf-8", "it") == "Hm."
    with pytest.raises(EngineProtocolError, match="no transcription"):
        read_text(b"<html>", "application/json", "it")


@pytest.mark.parametrize("media_type", ["audio/mpeg", "audio/mpeg\r\nX-Own: 1", "", "nonsense"])
def test_a_form_holds_what_a_caller_chose_in_its_values_only(media_type: str) -> None:
    values = {"model": "a/b", "prompt": 'x"\r\n--boundary\r\nContent-Disposition: form-data; name="stream"'}
    file = FormFile(name="file", file_name="audio.mp3", content_type=media_type, data=b"\r\n\0\xff--")
    content_type, body = form(values, file)

    parser = BytesParser(policy=email.policy.HTTP)
    parts = list(parser.parsebytes(f"Content-Type: {content_type}\r\n\r\n".encode() + body).iter_parts())
    found = {part.get_param("name", header="Content-Disposition"): part for part in parts}
    assert sorted(map(str, found)) == ["file", "model", "prompt"]
    assert found["model"].get_payload(decode=True) == b"a/b"
    assert found["file"].get_payload(decode=True) == file.data
    assert found["file"].get_content_type() == (
        "audio/mpeg" if media_type == "audio/mpeg" else "application/octet-stream"
    )
    assert set(found["file"].keys()) == {"Content-Disposition", "Content-Type"}


def test_a_wav_file_is_known_by_its_bytes_and_by_its_end() -> None:
    whole = wav("hm")
    assert not is_silent(require_wav(whole, "it"))
    assert is_silent(require_wav(silence(), "it"))
    streamed = whole.replace(whole[whole.index(b"data") + 4 :][:4], b"\xff\xff\xff\xff", 1)
    assert require_wav(streamed[:-10], "it")
    with pytest.raises(EngineProtocolError, match=r"it broke off after \d+ of \d+ bytes of audio"):
        require_wav(whole[:-10], "it")
    with pytest.raises(EngineProtocolError, match="b'<!doctype html>' instead of a WAV file"):
        require_wav(b"<!doctype html>", "it")
    with pytest.raises(EngineProtocolError, match="nothing instead of a WAV file"):
        require_wav(b"", "it")
    with pytest.raises(EngineProtocolError, match="without samples"):
        require_wav(whole[:30], "it")


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    made = EngineClient()
    yield made
    await made.aclose()


def spec_of(dialect: str) -> DeploymentSpec:
    return DeploymentSpec(
        id="d1",
        node_id="n1",
        model="a-model",
        engine=EngineSpec(engine=ServiceEngine(dialect=dialect), runtime=ProcessRuntime(executable="engine")),
    )


async def test_command_lines(client: EngineClient) -> None:
    piper = PiperAdapter(client).command_line(spec_of("piper"), listen_host="127.0.0.1", listen_port=9)
    assert piper.arguments == ("-m", "a-model", "--host", "127.0.0.1", "--port", "9")
    xtts = XttsAdapter(client).command_line(spec_of("xtts"), listen_host="127.0.0.1", listen_port=9)
    assert xtts.arguments == ("--host", "127.0.0.1", "--port", "9")
    speaches = SpeachesAdapter(client).command_line(
        spec_of("speaches"), listen_host="127.0.0.1", listen_port=9
    )
    assert speaches.arguments == ()
    assert speaches.environment == {
        "UVICORN_HOST": "127.0.0.1",
        "UVICORN_PORT": "9",
        "STT_MODEL_TTL": "-1",
        "TTS_MODEL_TTL": "-1",
        "PYTHONUNBUFFERED": "1",
    }


@pytest.mark.parametrize("adapter", [PiperAdapter, XttsAdapter, SpeachesAdapter])
async def test_a_spec_for_another_engine_is_refused(
    client: EngineClient, adapter: type[PiperAdapter] | type[XttsAdapter] | type[SpeachesAdapter]
) -> None:
    with pytest.raises(InvalidRequestError, match="d1 is not a deployment of"):
        adapter(client).command_line(spec_of("sana"), listen_host="h", listen_port=1)
