"""GGUF metadata that changes a model's mathematics in ways that are not built.

Names are those of llama.cpp, without the architecture before them. A file may state any of them with the value that
leaves the mathematics as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rekindle.errors import ModelRejected

_NEUTRAL: Mapping[str, tuple[float, ...]] = {
    "expert_count": (0,),
    "use_parallel_residual": (False,),
    "swin_norm": (False,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "attention.scale": (0,),
    "attention.output_scale": (0, 1),
    "attention.temperature_scale": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "rope.scaling.alpha": (0,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
}
_EXTRAPOLATION = "rope.scaling.yarn_ext_factor"
_MEANING = {
    "expert_count": "a mixture of experts",
    "attention.causal": "attention to later tokens",
}


def refuse_unbuilt(file_name: str, architecture: str, metadata: Mapping[str, Any]) -> None:
    """Raise `ModelRejected` for the first setting that is not neutral, by its name and value."""
    for name, neutral in _NEUTRAL.items():
        value = metadata.get(f"{architecture}.{name}")
        if value is not None and value not in neutral:
            raise _refusal(file_name, f"{architecture}.{name}", value, " or ".join(map(str, neutral)), name)
    _refuse_extrapolation(file_name, architecture, metadata)


def _refuse_extrapolation(file_name: str, architecture: str, metadata: Mapping[str, Any]) -> None:
    """llama.cpp takes a negative factor for one that is not set, which is 1 with YaRN and 0 without."""
    value = metadata.get(f"{architecture}.{_EXTRAPOLATION}")
    neutral = 1 if metadata.get(f"{architecture}.rope.scaling.type") == "yarn" else 0
    is_unset = isinstance(value, int | float) and value < 0
    if value is not None and not is_unset and value != neutral:
        raise _refusal(file_name, f"{architecture}.{_EXTRAPOLATION}", value, f"{neutral} or less than 0", "")


def _refusal(file_name: str, key: str, value: Any, neutral: str, name: str) -> ModelRejected:
    meaning = f", {_MEANING[name]}" if name in _MEANING else ""
    return ModelRejected(
        f"{file_name} sets {key} to {str(value)[:80]}{meaning}, which is not built; it must be {neutral} or absent: "
        "import a model that does not need it"
    )
