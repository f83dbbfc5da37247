"""Speaking and hearing: from a wish to audio that is stored, or to text as it comes."""

from controlplane.pipelines.speech._pipeline import VoicePipeline
from controlplane.pipelines.speech._voice_slots import VoiceSlots

__all__ = ["VoicePipeline", "VoiceSlots"]
