"""What a wish passes before it is generated: the safety filter, and the enhancement of its prompt."""

from controlplane.stages._enhancer import LadderEnhancer
from controlplane.stages._matching import RuleError, compile_matcher
from controlplane.stages._ports import (
    AUTO_MODEL,
    Answer,
    Ask,
    Enhanced,
    Message,
    PromptEnhancer,
    SafetyFilter,
    StageRequest,
    Verdict,
)
from controlplane.stages._rules import RuleFilter
from controlplane.stages._settings import (
    Blocked,
    EnhancementSettings,
    Moderation,
    SafetyPolicy,
    SafetySettings,
)
from controlplane.stages._stages import Stages, load_stages

__all__ = [
    "AUTO_MODEL",
    "Answer",
    "Ask",
    "Blocked",
    "Enhanced",
    "EnhancementSettings",
    "LadderEnhancer",
    "Message",
    "Moderation",
    "PromptEnhancer",
    "RuleError",
    "RuleFilter",
    "SafetyFilter",
    "SafetyPolicy",
    "SafetySettings",
    "StageRequest",
    "Stages",
    "Verdict",
    "compile_matcher",
    "load_stages",
]
