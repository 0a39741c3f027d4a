"""Text that a judge is shown and did not write: control tokens of chat templates in it are broken by a space."""

from __future__ import annotations

import re

_IN_ANGLES = (
    r"[|｜]",  # <|im_end|>, <｜Assistant｜>, and <|turn> of Gemma 4
    r"[a-z_]{1,40}[|｜]>",  # <turn|>
    r"/?s>",
    r"</?SYS>",
    r"(?:start|end)_of_turn>",
    r"(?:bos|eos|pad|unk)>",
    r"/?(?:think|tool_call|tool_response)>",
    r"extra_id_\d{1,4}>",  # turns of Nemotron, sentinels of T5
)
_IN_BRACKETS = (
    "INST",
    "SYSTEM_PROMPT",
    "MODEL_SETTINGS",
    "AVAILABLE_TOOLS",
    "TOOL_CALLS",
    "TOOL_RESULTS",
    "TOOL_CONTENT",
    "CALL_ID",
    "ARGS",
    "THINK",
)
_CONTROL = re.compile(rf"<(?={'|'.join(_IN_ANGLES)})|\[(?=/?(?:{'|'.join(_IN_BRACKETS)})\])")


def without_control(text: str) -> str:
    """The text in which ``<|im_end|>`` is ``< |im_end|>`` and ``[/INST]`` is ``[ /INST]``: no turn ends or begins."""
    return _CONTROL.sub(lambda begin: f"{begin[0]} ", text)
