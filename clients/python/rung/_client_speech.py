"""Speech and transcriptions: what a client has for them."""

from __future__ import annotations

from rung._client_generation import GenerationStream
from rung._client_mesh import MeshCalls
from rung.types import Policy, SpeechInput, TranscriptionInput


class SpeechCalls(MeshCalls):
    """The part of a client that has texts spoken and recordings written down."""

    def speak(
        self,
        text: str,
        *,
        voice: str = "",
        format: str = "wav",
        speed: float = 1.0,
        language: str = "",
        model: str = "",
        policy: Policy = Policy(),  # noqa: B008 - frozen
        request_id: str = "",
    ) -> GenerationStream:
        """Have a text spoken; the audio comes as it is made, as the result's only file.

        Args:
            text: what to say, 4,096 characters at most.
            voice: its name; empty for the engine's own. An unknown one is refused with those that there are.
            format: `wav`, which every engine makes, or another that one of them does.
            speed: 0.25 to 4; 1 is as usual.
            language: a BCP 47 tag, for engines that have to be told.
            model: as `generate`.
            policy: as `generate`.
            request_id: as `generate`.
        """
        wanted = SpeechInput(text=text, voice=voice, format=format, speed=speed, language=language)
        return self.generate(wanted, model=model, policy=policy, request_id=request_id)

    def transcribe(
        self,
        audio: bytes,
        *,
        content_type: str = "audio/wav",
        language: str = "",
        prompt: str = "",
        format: str = "text",
        translate: bool = False,
        model: str = "",
        policy: Policy = Policy(),  # noqa: B008 - frozen
        request_id: str = "",
    ) -> GenerationStream:
        """Have a recording written down; the text comes as it is heard.

        Args:
            audio: the file.
            content_type: its media type.
            language: a BCP 47 tag; empty to detect it.
            prompt: text that came before, or words that are to be expected.
            format: `text`; or `verbose_json`, `srt` or `vtt` for a file with times, which comes as a whole.
            translate: into English; comes as a whole.
            model: as `generate`.
            policy: as `generate`.
            request_id: as `generate`.
        """
        wanted = TranscriptionInput(
            audio=audio,
            content_type=content_type,
            language=language,
            prompt=prompt,
            format=format,
            translate=translate,
        )
        return self.generate(wanted, model=model, policy=policy, request_id=request_id)
