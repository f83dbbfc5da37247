"""The part of a blocking client that has texts spoken and recordings written down."""

from __future__ import annotations

from rung._sync_calls import SyncGenerationStream
from rung._sync_client_mesh import SyncMeshCalls
from rung.types import Policy


class SyncSpeechCalls(SyncMeshCalls):
    """What `SpeechCalls` has, method by method, without `await`."""

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
    ) -> SyncGenerationStream:
        """See `AsyncClient.speak`."""
        source = self._client.speak(
            text,
            voice=voice,
            format=format,
            speed=speed,
            language=language,
            model=model,
            policy=policy,
            request_id=request_id,
        )
        return SyncGenerationStream(self._thread, source)

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
    ) -> SyncGenerationStream:
        """See `AsyncClient.transcribe`."""
        source = self._client.transcribe(
            audio,
            content_type=content_type,
            language=language,
            prompt=prompt,
            format=format,
            translate=translate,
            model=model,
            policy=policy,
            request_id=request_id,
        )
        return SyncGenerationStream(self._thread, source)
