"""The simulated speaches, Piper and XTTS as real processes, through their adapters and over their HTTP."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path

import aiohttp
import msgspec
import pytest
from msgspec.structs import replace

from nodeagent.engines import (
    EngineAdapter,
    EngineHealth,
    GenerateControl,
    Generation,
    PiperAdapter,
    SpeachesAdapter,
    XttsAdapter,
)
from nodeagent.engines._speech import require_wav
from nodeagent.simulators._sound import heard, wav
from nodeagent.simulators.gpu import SimulatedGpus, SimulatedGpuSpec
from rung.codec import GenerationEvent
from rung.errors import EngineFailedError, EngineProtocolError, InvalidRequestError
from rung.service import EngineClient
from rung.types import (
    ArtifactChunk,
    DeploymentSpec,
    EngineInput,
    EngineSpec,
    ExternalRuntime,
    PhaseProgress,
    ProcessRuntime,
    ServiceEngine,
    SpeechInput,
    TokenDelta,
    TranscriptionInput,
)
from tests.integration.engine_process import EngineProcess, engine_process, free_port, python_module, until

GIB = 1024**3
WHISPER = "Systran/faster-whisper-small"
KOKORO = "speaches-ai/Kokoro-82M-v1.0-ONNX"
TEXT = "the machines hum in the cellar and take turns all night"


def spec_of(dialect: str, model: str) -> DeploymentSpec:
    return DeploymentSpec(
        id=f"{dialect}-1",
        node_id="n1",
        model=model,
        capabilities=("transcription" if "whisper" in model else "speech",),
        engine=EngineSpec(
            engine=ServiceEngine(dialect=dialect),
            runtime=ProcessRuntime(executable=dialect),
            start_timeout_s=20.0,
        ),
    )


EARS = spec_of("speaches", WHISPER)
MOUTH = spec_of("speaches", KOKORO)
PIPER = spec_of("piper", "en_US-lessac-medium")
XTTS = spec_of("xtts", "xtts-v2")
ADAPTERS: dict[str, type[SpeachesAdapter] | type[PiperAdapter] | type[XttsAdapter]] = {
    "speaches": SpeachesAdapter,
    "piper": PiperAdapter,
    "xtts": XttsAdapter,
}


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    made = EngineClient()
    yield made
    await made.aclose()


@pytest.fixture
def gpus(tmp_path: Path) -> SimulatedGpus:
    gpu = SimulatedGpuSpec(name="RTX 5090", memory_total_bytes=32 * GIB)
    return SimulatedGpus.create(tmp_path / "gpus", gpus=[gpu])


class Started:
    """Starts simulated engines of speech on the simulated machine."""

    def __init__(self, client: EngineClient, folder: Path) -> None:
        self._client = client
        self._folder = folder

    def __call__(
        self, spec: DeploymentSpec, *arguments: str, **environment: str
    ) -> AbstractAsyncContextManager[EngineProcess]:
        port = free_port()
        assert isinstance(spec.engine.engine, ServiceEngine)
        dialect = spec.engine.engine.dialect
        line = ADAPTERS[dialect](self._client).command_line(spec, listen_host="127.0.0.1", listen_port=port)
        given = {
            "RUNG_SIM_SPEED": "200",
            "RUNG_SIM_LOAD_S": "0.05",
            "RUNG_SIM_GPUS": str(self._folder / "gpus"),
            **line.environment,
            **environment,
        }
        return engine_process(
            [*python_module(f"nodeagent.simulators.{dialect}"), *line.arguments, *arguments],
            port=port,
            log_path=self._folder / f"{dialect}-{port}.log",
            environment=given,
        )


@pytest.fixture
def start(client: EngineClient, gpus: SimulatedGpus, tmp_path: Path) -> Started:
    return Started(client, tmp_path)


async def events_of(
    adapter: GenerateControl, engine: EngineProcess, spec: DeploymentSpec, wanted: EngineInput
) -> list[GenerationEvent]:
    generation = Generation(job_id="j1", input=wanted, idle_timeout_s=10.0)
    async with aclosing(adapter.generate(engine.base_url, spec, generation)) as events:
        return [event async for event in events]


def file_of(events: list[GenerationEvent]) -> tuple[str, bytes]:
    """The one file in what an engine gave, checked against what is said of it."""
    pieces = [event for event in events if isinstance(event, ArtifactChunk)]
    data = b"".join(piece.data for piece in pieces)
    assert [piece.offset_bytes for piece in pieces] == [
        sum(len(before.data) for before in pieces[:place]) for place in range(len(pieces))
    ]
    assert all(piece.length_bytes == len(piece.data) <= 256 * 1024 for piece in pieces)
    assert (pieces[-1].sha256, pieces[-1].size_bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    return pieces[0].content_type, data


def text_of(events: list[GenerationEvent]) -> str:
    return "".join(event.content for event in events if isinstance(event, TokenDelta))


def held(gpus: SimulatedGpus) -> int:
    return sum(process.gpu_bytes.get(0, 0) for process in gpus.read().processes)


async def request(
    method: str, url: str, body: object = None, data: bytes | None = None
) -> tuple[int, str, bytes]:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, url, json=body, data=data) as response,
    ):
        return response.status, response.content_type, await response.read()


async def counted(engine: EngineProcess, counter: str) -> None:
    """Return once a counter of the simulator is 1."""
    async with asyncio.timeout(10):
        while True:
            _, _, state = await request("GET", f"{engine.base_url}/sim/state")
            if msgspec.json.decode(state)[counter] == 1:
                return
            await asyncio.sleep(0.02)


# speaches: residency.


async def test_speaches_sleeps_until_its_model_is_loaded_and_gives_its_memory_back(
    start: Started, client: EngineClient, gpus: SimulatedGpus
) -> None:
    adapter = SpeachesAdapter(client)
    async with start(EARS) as engine:
        await engine.become(EngineHealth.ASLEEP, adapter, EARS)
        assert held(gpus) == 0

        await adapter.wake(engine.base_url, EARS, 2)
        assert held(gpus) == 600_000_000
        assert (await adapter.probe(engine.base_url, EARS)).health is EngineHealth.READY
        assert (await adapter.probe(engine.base_url, MOUTH)).health is EngineHealth.ASLEEP
        # Loading what is loaded changes nothing.
        await adapter.wake(engine.base_url, EARS, 2)

        await adapter.sleep(engine.base_url, EARS, 2)
        assert held(gpus) == 0
        assert (await adapter.probe(engine.base_url, EARS)).health is EngineHealth.ASLEEP
        await adapter.free(engine.base_url, EARS)
        steps = [found for line in engine.log().splitlines() if (found := adapter.load_progress(line))]

    assert [step.detail for step in steps][:2] == ["listening", f"loading {WHISPER}"]


async def test_a_model_that_speaches_lists_while_it_loads_is_not_awake_yet(
    start: Started, client: EngineClient
) -> None:
    adapter = SpeachesAdapter(client)
    async with start(EARS, RUNG_SIM_FAULTS="never_ready") as engine:
        await engine.become(EngineHealth.ASLEEP, adapter, EARS)
        waking = asyncio.create_task(adapter.wake(engine.base_url, EARS, 2))
        await engine.become(EngineHealth.LOADING, adapter, EARS)
        _, _, listed = await request("GET", f"{engine.base_url}/api/ps")
        assert WHISPER.encode() in listed
        await request("POST", f"{engine.base_url}/sim/faults", {"faults": []})
        await waking
        await engine.become(EngineHealth.READY, adapter, EARS)


async def test_a_load_that_failed_is_taken_off_the_list(
    start: Started, client: EngineClient, gpus: SimulatedGpus
) -> None:
    adapter = SpeachesAdapter(client)
    async with start(EARS, RUNG_SIM_VRAM_BYTES=str(64 * GIB)) as engine:
        await engine.become(EngineHealth.ASLEEP, adapter, EARS)
        with pytest.raises(EngineFailedError, match="out of memory"):
            await adapter.wake(engine.base_url, EARS, 2)
        assert (await adapter.probe(engine.base_url, EARS)).health is EngineHealth.ASLEEP
        await adapter.free(engine.base_url, EARS)
    assert held(gpus) == 0


async def test_an_unload_of_what_is_in_use_fails_although_it_is_no_longer_listed(
    start: Started, client: EngineClient, gpus: SimulatedGpus
) -> None:
    adapter = SpeachesAdapter(client)
    async with start(EARS, RUNG_SIM_FAULTS="hang") as engine:
        await engine.become(EngineHealth.ASLEEP, adapter, EARS)
        work = asyncio.create_task(events_of(adapter, engine, EARS, TranscriptionInput(audio=wav(TEXT))))
        await engine.become(EngineHealth.READY, adapter, EARS)
        await until(lambda: held(gpus) > 0, "it is loaded")

        with pytest.raises(EngineFailedError, match=r"somebody uses .* holds its memory until"):
            await adapter.free(engine.base_url, EARS)
        assert held(gpus) == 600_000_000
        _, _, listed = await request("GET", f"{engine.base_url}/api/ps")
        assert b"whisper" not in listed

        await request("POST", f"{engine.base_url}/sim/faults", {"faults": []})
        assert text_of(await work) == TEXT
        await until(lambda: held(gpus) == 0, "the memory goes with the last request")


async def test_a_model_that_is_not_there_is_not_fetched_and_it_is_said_how_to_get_it(
    start: Started, client: EngineClient
) -> None:
    adapter = SpeachesAdapter(client)
    spec = spec_of("speaches", "Systran/faster-whisper-large-v3")
    async with start(spec) as engine:
        probe, _ = await engine.become(EngineHealth.NO_MODEL, adapter, spec)
        url = f"{engine.base_url}/v1/models/Systran/faster-whisper-large-v3"
        assert f"curl -X POST {url}" in probe.detail
        with pytest.raises(EngineFailedError, match="fetches it from Hugging Face"):
            await events_of(adapter, engine, spec, TranscriptionInput(audio=wav(TEXT)))

        # A download says 200, one that was not needed 201.
        assert (await request("POST", url))[0] == 200
        assert (await request("POST", url))[0] == 201
        assert (await request("POST", f"{engine.base_url}/v1/models/a/gated"))[0] == 401
        assert (await request("POST", f"{engine.base_url}/v1/models/a/missing"))[0] == 404
        await engine.become(EngineHealth.ASLEEP, adapter, spec)


async def test_a_server_that_wants_a_key_says_so(start: Started, client: EngineClient) -> None:
    adapter = SpeachesAdapter(client)
    async with start(EARS, API_KEY="secret") as engine:
        await until(lambda: "Uvicorn running" in engine.log(), "it listens")
        probe = await adapter.probe(engine.base_url, EARS)
    assert (probe.health, "start it without API_KEY" in probe.detail) == (EngineHealth.UNWELL, True)


# speaches: hearing.


async def test_speech_is_transcribed_as_it_comes(start: Started, client: EngineClient) -> None:
    adapter = SpeachesAdapter(client)
    async with start(EARS) as engine:
        await engine.become(EngineHealth.ASLEEP, adapter, EARS)
        wanted = TranscriptionInput(audio=wav(TEXT), content_type="audio/wav", language="en-GB", prompt="hm")
        events = await events_of(adapter, engine, EARS, wanted)

    progress, *deltas = events
    assert isinstance(progress, PhaseProgress)
    assert progress.detail.startswith("transcribing ")
    assert len(deltas) > 2
    assert text_of(events) == TEXT


async def test_a_translation_comes_as_a_whole(start: Started, client: EngineClient) -> None:
    adapter = SpeachesAdapter(client)
    async with start(EARS) as engine:
        await engine.become(EngineHealth.ASLEEP, adapter, EARS)
        events = await events_of(adapter, engine, EARS, TranscriptionInput(audio=wav(TEXT), translate=True))
    assert [type(event) for event in events] == [PhaseProgress, TokenDelta]
    assert text_of(events) == f"[en] {TEXT}"


@pytest.mark.parametrize(
    ("form", "content_type", "inside"),
    [
        ("srt", "application/x-subrip", b"1\n00:00:00,000 --> "),
        ("vtt", "text/vtt", b"WEBVTT\n\n"),
        ("verbose_json", "application/json", b'"segments":[{"id":0,'),
    ],
)
async def test_files_with_times(
    start: Started, client: EngineClient, form: str, content_type: str, inside: bytes
) -> None:
    adapter = SpeachesAdapter(client)
    async with start(EARS) as engine:
        await engine.become(EngineHealth.ASLEEP, adapter, EARS)
        events = await events_of(adapter, engine, EARS, TranscriptionInput(audio=wav(TEXT), format=form))
        with pytest.raises(InvalidRequestError, match="transcribes to text, verbose_json, srt, vtt, not lrc"):
            await events_of(adapter, engine, EARS, TranscriptionInput(audio=b"RIFF", format="lrc"))
    found_type, data = file_of(events)
    assert found_type == content_type
    assert inside in data


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [("cut_mid_stream", "connection"), ("broken_sse", "no event of a transcription")],
)
async def test_a_transcription_that_breaks_off_is_an_error(
    start: Started, client: EngineClient, fault: str, complaint: str
) -> None:
    adapter = SpeachesAdapter(client)
    async with start(EARS, RUNG_SIM_FAULTS=fault) as engine:
        await engine.become(EngineHealth.ASLEEP, adapter, EARS)
        with pytest.raises(EngineProtocolError, match=complaint):
            await events_of(adapter, engine, EARS, TranscriptionInput(audio=wav(TEXT)))


async def test_leaving_a_transcription_ends_it_in_the_engine(start: Started, client: EngineClient) -> None:
    adapter = SpeachesAdapter(client)
    async with start(EARS, RUNG_SIM_SPEED="1") as engine:
        await engine.become(EngineHealth.ASLEEP, adapter, EARS)
        generation = Generation(job_id="j1", input=TranscriptionInput(audio=wav(TEXT * 40)))
        async with aclosing(adapter.generate(engine.base_url, EARS, generation)) as events:
            async for event in events:
                if isinstance(event, TokenDelta):
                    break
        await counted(engine, "aborted")


# speaches: speaking.


@pytest.mark.parametrize(("form", "content_type"), [("wav", "audio/wav"), ("mp3", "audio/mpeg")])
async def test_kokoro_speaks_as_it_goes(
    start: Started, client: EngineClient, form: str, content_type: str
) -> None:
    adapter = SpeachesAdapter(client)
    async with start(MOUTH) as engine:
        await engine.become(EngineHealth.ASLEEP, adapter, MOUTH)
        wanted = SpeechInput(text=TEXT, voice="bf_emma", format=form)
        events = await events_of(adapter, engine, MOUTH, wanted)
        voices = await adapter.voices(engine.base_url, MOUTH)
    found_type, data = file_of(events)
    assert found_type == content_type
    assert len(events) > 4
    if form == "wav":
        assert require_wav(data, "it")
        assert heard(data) == TEXT
    assert (voices[0].name, voices[0].language) == ("af_heart", "en-us")


@pytest.mark.parametrize("voice", ["alloy", "nobody"])
async def test_a_voice_that_kokoro_would_silently_replace_is_refused(
    start: Started, client: EngineClient, voice: str
) -> None:
    adapter = SpeachesAdapter(client)
    async with start(MOUTH) as engine:
        await engine.become(EngineHealth.ASLEEP, adapter, MOUTH)
        with pytest.raises(InvalidRequestError, match=f"no voice '{voice}'; it has af_heart, am_adam"):
            await events_of(adapter, engine, MOUTH, SpeechInput(text=TEXT, voice=voice))
        with pytest.raises(InvalidRequestError, match="Speed must be between"):
            await events_of(adapter, engine, MOUTH, SpeechInput(text=TEXT, speed=9.0))


async def test_audio_that_is_cut_after_its_200_is_an_error(start: Started, client: EngineClient) -> None:
    adapter = SpeachesAdapter(client)
    async with start(MOUTH, RUNG_SIM_FAULTS="cut_mid_stream") as engine:
        await engine.become(EngineHealth.ASLEEP, adapter, MOUTH)
        with pytest.raises(EngineProtocolError):
            await events_of(adapter, engine, MOUTH, SpeechInput(text=TEXT))


# Piper.


@pytest.mark.parametrize("version", ["1.3", "1.8"])
async def test_piper_speaks_wherever_its_version_does(
    start: Started, client: EngineClient, version: str
) -> None:
    adapter = PiperAdapter(client)
    async with start(PIPER, RUNG_SIM_PIPER_VERSION=version) as engine:
        await engine.become(EngineHealth.READY, adapter, PIPER)
        content_type, data = file_of(await events_of(adapter, engine, PIPER, SpeechInput(text=TEXT)))
        german = SpeechInput(text=TEXT, voice="de_DE-thorsten-medium", speed=2.0)
        _, other = file_of(await events_of(adapter, engine, PIPER, german))
        voices = await adapter.voices(engine.base_url, PIPER)
        path = "/synthesize" if version == "1.8" else "/"
        _, called, _ = await request("POST", engine.base_url + path, {"text": "x"})
    # It calls it a web page.
    assert (content_type, called) == ("audio/wav", "text/html")
    assert heard(data) == TEXT
    assert heard(other) == f"[de_DE-thorsten-medium] {TEXT}"
    assert len(other) < 0.6 * len(data)
    assert [(voice.name, voice.language) for voice in voices] == [
        ("de_DE-thorsten-medium", "de-DE"),
        ("en_US-lessac-medium", "en-US"),
    ]


async def test_a_voice_that_piper_would_silently_replace_is_refused(
    start: Started, client: EngineClient
) -> None:
    adapter = PiperAdapter(client)
    async with start(PIPER) as engine:
        await engine.become(EngineHealth.READY, adapter, PIPER)
        status, _, data = await request(
            "POST", f"{engine.base_url}/synthesize", {"text": TEXT, "voice": "alloy"}
        )
        assert (status, heard(data)) == (200, TEXT)
        complaint = "no voice 'alloy'; it has de_DE-thorsten-medium, en_US-lessac-medium"
        with pytest.raises(InvalidRequestError, match=complaint):
            await events_of(adapter, engine, PIPER, SpeechInput(text=TEXT, voice="alloy"))
        with pytest.raises(InvalidRequestError, match="Piper makes wav, not mp3"):
            await events_of(adapter, engine, PIPER, SpeechInput(text=TEXT, format="mp3"))
        with pytest.raises(InvalidRequestError, match="nothing to say"):
            await events_of(adapter, engine, PIPER, SpeechInput(text=" \n"))


async def test_a_voice_whose_name_piper_mangles_can_be_its_own(start: Started, client: EngineClient) -> None:
    adapter = PiperAdapter(client)
    spec = spec_of("piper", "my-son")
    async with start(spec, RUNG_SIM_VOICES="my-son,other") as engine:
        await engine.become(EngineHealth.READY, adapter, spec)
        names = [voice.name for voice in await adapter.voices(engine.base_url, spec)]
        _, data = file_of(await events_of(adapter, engine, spec, SpeechInput(text=TEXT)))
    assert names == ["my-", "other"]
    assert heard(data) == TEXT


async def test_an_external_piper_without_the_voice_of_its_deployment_says_how_to_get_it(
    start: Started, client: EngineClient
) -> None:
    adapter = PiperAdapter(client)
    async with start(PIPER) as engine:
        await engine.become(EngineHealth.READY, adapter, PIPER)
        runtime = ExternalRuntime(base_url=engine.base_url)
        spec = replace(PIPER, model="fr_FR-siwis-medium", engine=replace(PIPER.engine, runtime=runtime))
        probe = await adapter.probe(engine.base_url, spec)
    assert probe.health is EngineHealth.NO_MODEL
    assert "piper.download_voices fr_FR-siwis-medium" in probe.detail


@pytest.mark.parametrize(
    ("fault", "error"), [("http_500", EngineFailedError), ("cut_mid_stream", EngineProtocolError)]
)
async def test_piper_fails_in_web_pages_and_in_half_files(
    start: Started, client: EngineClient, fault: str, error: type[Exception]
) -> None:
    adapter = PiperAdapter(client)
    async with start(PIPER, RUNG_SIM_FAULTS=fault) as engine:
        await engine.become(EngineHealth.READY, adapter, PIPER)
        with pytest.raises(error, match="answers 500" if fault == "http_500" else "broke off after"):
            await events_of(adapter, engine, PIPER, SpeechInput(text=TEXT))


async def test_piper_without_its_voice_does_not_start(start: Started, tmp_path: Path) -> None:
    async with start(PIPER, RUNG_SIM_VOICES="other") as engine:
        assert await engine.exit_code() == 1
        assert "use piper.download_voices" in engine.log()


# XTTS.


async def test_xtts_speaks_with_a_recording_in_a_language(
    start: Started, client: EngineClient, gpus: SimulatedGpus
) -> None:
    adapter = XttsAdapter(client)
    async with start(XTTS) as engine:
        await engine.become(EngineHealth.READY, adapter, XTTS)
        assert held(gpus) == 2_100_000_000
        wanted = SpeechInput(text=TEXT, voice="female", language="zh-Hans-CN")
        content_type, data = file_of(await events_of(adapter, engine, XTTS, wanted))
        _, plain = file_of(await events_of(adapter, engine, XTTS, SpeechInput(text=TEXT)))
        assert [voice.name for voice in await adapter.voices(engine.base_url, XTTS)] == [
            "calm_female",
            "female",
            "male",
        ]
        assert (await request("POST", f"{engine.base_url}/tts_to_audio", {}))[0] == 404
    assert content_type == "audio/wav"
    assert heard(data) == f"[female/zh-cn] {TEXT}"
    assert heard(plain) == f"[calm_female/en] {TEXT}"


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [
        (SpeechInput(text=TEXT, voice="/etc/passwd"), "no voice '/etc/passwd'; it has calm_female"),
        (SpeechInput(text=TEXT, language="tlh"), "does not speak 'tlh'; it speaks de, en"),
        (SpeechInput(text=TEXT, speed=2.0), "XTTS has one pace"),
        (SpeechInput(text=TEXT, format="mp3"), "XTTS makes wav, not mp3"),
    ],
)
async def test_what_xtts_cannot_do_is_refused(
    start: Started, client: EngineClient, wanted: SpeechInput, complaint: str
) -> None:
    adapter = XttsAdapter(client)
    async with start(XTTS) as engine:
        await engine.become(EngineHealth.READY, adapter, XTTS)
        with pytest.raises(InvalidRequestError, match=complaint):
            await events_of(adapter, engine, XTTS, wanted)


async def test_a_file_of_the_machine_is_not_read_out(
    start: Started, client: EngineClient, tmp_path: Path
) -> None:
    adapter = XttsAdapter(client)
    secret = tmp_path / "secret.txt"
    secret.write_text("the password is swordfish")
    async with start(XTTS) as engine:
        await engine.become(EngineHealth.READY, adapter, XTTS)
        _, data = file_of(await events_of(adapter, engine, XTTS, SpeechInput(text=str(secret))))
    assert "swordfish" not in heard(data)
    assert "secret.txt" in heard(data)


async def test_the_streaming_mode_of_xtts_is_found_out_by_its_silence(
    start: Started, client: EngineClient
) -> None:
    adapter = XttsAdapter(client)
    async with start(XTTS, "--streaming-mode") as engine:
        await engine.become(EngineHealth.READY, adapter, XTTS)
        with pytest.raises(EngineFailedError, match="start it without --streaming-mode"):
            await events_of(adapter, engine, XTTS, SpeechInput(text=TEXT))


async def test_xtts_is_well_while_it_speaks_although_it_answers_nothing(
    start: Started, client: EngineClient
) -> None:
    adapter = XttsAdapter(client)
    async with start(XTTS, RUNG_SIM_FAULTS="hang") as engine:
        await engine.become(EngineHealth.READY, adapter, XTTS)
        work = asyncio.create_task(events_of(adapter, engine, XTTS, SpeechInput(text=TEXT)))
        await counted(engine, "active")
        stranger: EngineAdapter = XttsAdapter(client)
        assert (await stranger.probe(engine.base_url, XTTS)).health is EngineHealth.UNWELL
        assert (await adapter.probe(engine.base_url, XTTS)).health is EngineHealth.READY
        await request("POST", f"{engine.base_url}/sim/faults", {"faults": []})
        assert file_of(await work)[1]


async def test_a_failure_of_xtts_keeps_its_words(start: Started, client: EngineClient) -> None:
    adapter = XttsAdapter(client)
    async with start(XTTS, RUNG_SIM_FAULTS="http_500") as engine:
        await engine.become(EngineHealth.READY, adapter, XTTS)
        with pytest.raises(EngineFailedError, match="answers 500: Error: CUDA error"):
            await events_of(adapter, engine, XTTS, SpeechInput(text=TEXT))
