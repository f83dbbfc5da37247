"""Speech from a caller to an engine and back: control plane, agent and simulated engines as processes."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

import rung
from nodeagent.simulators._sound import heard, wav
from tests.integration.stack import SIMULATORS, Stack, stack

TEXT = "the machines hum in the cellar and take turns all night"
WHISPER = "Systran/faster-whisper-small"
SPEECH: dict[str, Any] = {
    name: SIMULATORS["ollama"] | {"arguments_prefix": ["-m", f"nodeagent.simulators.{name}"]}
    for name in ("speaches", "piper", "xtts")
}
FAST = {"RUNG_SIM_SPEED": "200", "RUNG_SIM_LOAD_S": "0.05"}


def deployment(kind: str, model: str, **more: Any) -> dict[str, Any]:
    environment: Mapping[str, str] = FAST | more.pop("environment", {})
    return {
        "id": more.pop("id", kind),
        "model": model,
        "engine": {"kind": kind},
        "runtime": {"kind": "process", "executable": kind, "environment": dict(environment)},
        "capabilities": ["transcription" if "whisper" in model else "speech"],
        "start_timeout": "30s",
        **more,
    }


EARS = deployment("speaches", WHISPER, id="ears", aliases=["whisper-1"])
PIPER = deployment("piper", "en_US-lessac-medium", id="piper", aliases=["tts-1"])


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[Stack]:
    async with stack(tmp_path, [EARS, PIPER], agent={"executables": SPEECH}) as found:
        yield found


def client_of(plane: Stack) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{plane.http}/v1", api_key="none", max_retries=0)


async def engine_state(plane: Stack, deployment_id: str) -> dict[str, Any]:
    found = await plane.deployment(deployment_id)
    assert found.endpoint is not None
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{found.endpoint.base_url}/sim/state") as response,
    ):
        state: dict[str, Any] = await response.json()
        return state


async def test_openai_clients_speak_and_hear(plane: Stack) -> None:
    async with client_of(plane) as client:
        spoken = await client.audio.speech.with_raw_response.create(model="tts-1", voice="", input=TEXT)
        audio = spoken.content
        assert spoken.headers["Content-Type"] == "audio/wav"
        assert spoken.headers["X-Rung-Target"] == "piper"
        assert spoken.headers["X-Rung-Node"] == "box"
        assert heard(audio) == TEXT

        file = ("said.wav", audio, "audio/wav")
        whole = await client.audio.transcriptions.create(model="whisper-1", file=file, language="en")
        assert whole.text == TEXT
        assert whole.model_extra is not None
        assert whole.model_extra["rung"]["target"] == "ears"

        events = await client.audio.transcriptions.create(
            model="whisper-1", file=file, response_format="json", stream=True
        )
        kinds, deltas, done = [], "", ""
        async for event in events:
            kinds.append(event.type)
            if event.type == "transcript.text.delta":
                deltas += event.delta
            elif event.type == "transcript.text.done":
                done = event.text
        assert deltas == done == TEXT
        assert kinds[-1] == "transcript.text.done"
        assert len(kinds) > 3

        verbose = await client.audio.transcriptions.create(
            model="whisper-1", file=file, response_format="verbose_json"
        )
        assert verbose.text == TEXT
        assert verbose.segments is not None
        assert verbose.segments[0].end > verbose.segments[0].start
        srt = await client.audio.transcriptions.create(model="whisper-1", file=file, response_format="srt")
        assert srt.startswith("1\n00:00:00,000 --> ")
        async with client.audio.speech.with_streaming_response.create(
            model="tts-1", voice="de_DE-thorsten-medium", input=TEXT, speed=2.0
        ) as streamed:
            audio = b"".join([piece async for piece in streamed.iter_bytes()])
        assert heard(audio) == f"[de_DE-thorsten-medium] {TEXT}"


async def test_a_translation_is_english(plane: Stack) -> None:
    form = aiohttp.FormData({"model": "whisper-1", "response_format": "text"})
    form.add_field("file", wav(TEXT), filename="a.wav", content_type="audio/wav")
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{plane.http}/v1/audio/translations", data=form) as response,
    ):
        assert (response.status, response.content_type) == (200, "text/plain")
        assert await response.text() == f"[en] {TEXT}"


async def test_what_cannot_be_done_is_refused_with_what_can(plane: Stack) -> None:
    async with client_of(plane) as client:
        with pytest.raises(openai.BadRequestError, match="no voice 'alloy'; it has de_DE-thorsten-medium"):
            await client.audio.speech.create(model="tts-1", voice="alloy", input=TEXT)
        with pytest.raises(openai.BadRequestError, match="nobody here makes the format mp3: piper makes wav"):
            await client.audio.speech.create(model="tts-1", voice="", input=TEXT, response_format="mp3")
        with pytest.raises(openai.BadRequestError, match="input is empty"):
            await client.audio.speech.create(model="tts-1", voice="", input=" ")
        with pytest.raises(openai.BadRequestError, match=r"speed is 9; it must be 0\.25 to 4"):
            await client.audio.speech.create(model="tts-1", voice="", input=TEXT, speed=9)
        with pytest.raises(openai.BadRequestError, match="tts-1 cannot do transcription"):
            await client.audio.transcriptions.create(model="tts-1", file=("a.wav", wav(TEXT)))
        with pytest.raises(openai.NotFoundError, match="there is no model 'nobody'"):
            await client.audio.speech.create(model="nobody", voice="", input=TEXT)
        with pytest.raises(openai.BadRequestError, match="the format srt comes as a whole"):
            await client.audio.transcriptions.create(
                model="whisper-1", file=("a.wav", wav(TEXT)), response_format="srt", stream=True
            )
        with pytest.raises(openai.BadRequestError, match="times of words are not told"):
            await client.audio.transcriptions.create(
                model="whisper-1", file=("a.wav", wav(TEXT)), timestamp_granularities=["word"]
            )
        with pytest.raises(openai.BadRequestError, match="the audio file is empty"):
            await client.audio.transcriptions.create(model="whisper-1", file=("a.wav", b""))


async def test_voices_are_listed_and_events_of_speech_say_what_goes_on(plane: Stack) -> None:
    async with aiohttp.ClientSession() as http:
        async with http.get(f"{plane.http}/v1/audio/voices") as response:
            before = await response.json()
        assert before["voices"] == []
        assert before["unknown"] == [
            {"deployment": "piper", "model": "en_US-lessac-medium", "reason": "it is stopped"}
        ]
        body = {"model": "tts-1", "input": TEXT, "stream_format": "sse"}
        async with http.post(f"{plane.http}/v1/audio/speech", json=body) as response:
            text = await response.text()
        phases = [
            json.loads(line.removeprefix(": rung.progress "))["phase"]
            for line in text.splitlines()
            if line.startswith(": rung.progress ")
        ]
        assert [phase for place, phase in enumerate(phases) if phase not in phases[:place]] == [
            "health_check",
            "engine_start",
            "generating",
            "done",
        ]
        events = [
            json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")
        ]
        assert {event["type"] for event in events[:-1]} == {"speech.audio.delta"}
        assert (events[-1]["type"], events[-1]["rung"]["target"]) == ("speech.audio.done", "piper")
        async with http.get(f"{plane.http}/v1/audio/voices?model=tts-1") as response:
            after = await response.json()
    assert [(voice["id"], voice["language"], voice["deployment"]) for voice in after["voices"]] == [
        ("de_DE-thorsten-medium", "de-DE", "piper"),
        ("en_US-lessac-medium", "en-US", "piper"),
    ]


async def test_a_caller_who_leaves_ends_the_transcription_in_the_engine(tmp_path: Path) -> None:
    slow = deployment("speaches", WHISPER, id="ears", environment={"RUNG_SIM_SPEED": "2"})
    async with stack(tmp_path, [slow], agent={"executables": SPEECH}) as plane, client_of(plane) as client:
        events = await client.audio.transcriptions.create(
            model=WHISPER, file=("a.wav", wav(TEXT * 60)), response_format="json", stream=True
        )
        async for event in events:
            if event.type == "transcript.text.delta":
                break
        assert (await engine_state(plane, "ears"))["active"] == 1
        await events.close()
        async with asyncio.timeout(15):
            while True:
                if (await engine_state(plane, "ears"))["aborted"] == 1:
                    break
                await asyncio.sleep(0.05)
        jobs = [job async for job in plane.client.list_jobs()]
    assert jobs[0].detail == "cancelled by caller_disconnected"


async def test_at_most_so_many_voices_at_once_and_who_waits_is_told_the_place(tmp_path: Path) -> None:
    slow = deployment("speaches", WHISPER, id="ears", environment={"RUNG_SIM_SPEED": "20"})
    async with stack(tmp_path, [slow], agent={"executables": SPEECH}) as plane, client_of(plane) as client:
        file = ("a.wav", wav(TEXT * 30))
        await client.audio.transcriptions.create(model=WHISPER, file=("a.wav", wav("hm")))
        most = 0
        work = [
            asyncio.create_task(client.audio.transcriptions.create(model=WHISPER, file=file))
            for _ in range(4)
        ]
        while not all(task.done() for task in work):
            most = max(most, (await engine_state(plane, "ears"))["active"])
            await asyncio.sleep(0.02)
        await asyncio.gather(*work)
        waited = []
        async for job in plane.client.list_jobs():
            async for event in plane.client.watch_job(job.id):
                detail = getattr(event.payload, "detail", "")
                if "voice slots of box" in detail:
                    waited.append(detail)
    assert most == 2
    assert sorted(set(waited)) == [
        f"waiting for one of 2 voice slots of box; place {place} in the queue" for place in (1, 2)
    ]


async def rung_command(plane: Stack, *arguments: str, stdin: bytes = b"") -> tuple[int, bytes, str]:
    """Exit code, stdout and stderr of the command."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "rung.cli",
        "--address",
        f"127.0.0.1:{plane.plane.ready['grpc_port']}",
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate(stdin)
    assert process.returncode is not None
    return process.returncode, out, err.decode()


async def test_the_command_speaks_and_writes_down(plane: Stack, tmp_path: Path) -> None:
    said = tmp_path / "said.wav"
    code, out, err = await rung_command(plane, "speak", TEXT, "-o", str(said))
    assert (code, out.decode().strip()) == (0, str(said)), err
    assert heard(said.read_bytes()) == TEXT
    assert "piper on box" in err

    code, out, err = await rung_command(plane, "transcribe", str(said))
    assert (code, out.decode().strip()) == (0, TEXT), err
    assert "ears on box" in err

    code, piped, err = await rung_command(plane, "speak", "-o", "-", stdin=b"good morning")
    assert (code, heard(piped)) == (0, "good morning"), err
    code, out, err = await rung_command(plane, "transcribe", "-", "--json", stdin=piped)
    assert (code, json.loads(out)["text"], json.loads(out)["served"]["target"]) == (0, "good morning", "ears")

    film = tmp_path / "film.srt"
    code, out, err = await rung_command(plane, "transcribe", str(said), "--format", "srt", "-o", str(film))
    assert (code, out.decode().strip()) == (0, str(film)), err
    assert film.read_text().startswith("1\n00:00:00,000 --> ")
    code, out, _ = await rung_command(plane, "transcribe", str(said), "--format", "vtt")
    assert (code, out[:6]) == (0, b"WEBVTT")

    code, _, err = await rung_command(plane, "speak", TEXT, "-o", str(said))
    assert (code, "--force overwrites it" in err) == (5, True)
    code, _, err = await rung_command(plane, "speak", TEXT, "--voice", "alloy", "-o", str(tmp_path / "a.wav"))
    assert code == 1
    assert "no voice 'alloy'; it has de_DE-thorsten-medium, en_US-lessac-medium" in err
    code, _, err = await rung_command(plane, "transcribe", str(tmp_path / "none.wav"))
    assert (code, "cannot be read: No such file" in err) == (2, True)


async def test_both_clients_have_speech(plane: Stack) -> None:
    result = await plane.client.speak(TEXT, model="tts-1").result()
    (file,) = result.artifacts
    assert (heard(file.data), file.artifact.content_type) == (TEXT, "audio/wav")
    written = await plane.client.transcribe(file.data).result()
    assert (written.text, written.artifacts) == (TEXT, ())

    def blocking() -> tuple[str, str]:
        with rung.Client(f"127.0.0.1:{plane.plane.ready['grpc_port']}") as client:
            audio = client.speak("good morning").result().artifacts[0].data
            srt = client.transcribe(audio, format="srt").result().artifacts[0]
            return client.transcribe(audio).result().text, srt.artifact.content_type

    assert await asyncio.to_thread(blocking) == ("good morning", "application/x-subrip")
