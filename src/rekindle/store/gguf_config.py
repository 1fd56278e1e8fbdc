"""A Hugging Face configuration from GGUF metadata.

GGUF keeps numbers under `<architecture>.*` and, for Llama 3's rope scaling, the resulting divisors in a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from rekindle.errors import ModelRejected
from rekindle.store.gguf_file import GgufFile
from rekindle.store.gguf_unbuilt import refuse_unbuilt

_FAMILIES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
_LARGEST_GEMMA_LAYERS = {"gemma2": 46, "gemma3": 62}
_GEMMA_PATTERNS = {"gemma2": 2, "gemma3": 6}
_LLAMA3_DEFAULTS = (8192.0, 1.0, 4.0)
_ROPE_TOLERANCE = 1e-4


def config_from_gguf(file: GgufFile) -> dict[str, Any]:
    """The config.json of the model in `file`.

    Raises:
        ModelRejected: the architecture or one of its settings is not supported, or a number is missing.
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _FAMILIES:
        raise ModelRejected(
            f"{file.name} is of architecture {str(architecture)[:80]!r}; supported in GGUF files are "
            f"{', '.join(_FAMILIES)}"
        )
    refuse_unbuilt(file.name, architecture, file.metadata)
    fields = _Fields(file.name, architecture, file.metadata)
    family, model_class = _FAMILIES[architecture]
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelRejected(f"{file.name} has no tensor token_embd.weight; is it a part of a split model?")
    sizes = _sizes(fields)
    config = {
        "architectures": [model_class],
        "model_type": family,
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **sizes,
        **_rope(fields, file, sizes["head_dim"]),
        "attention_bias": architecture == "llama" and "blk.0.attn_q.bias" in file.tensors,
        **_special_token_ids(file),
    }
    if family == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
        if fields.has("attention.sliding_window"):
            window = fields.count("attention.sliding_window")
            config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    if architecture in _LARGEST_GEMMA_LAYERS:
        config |= _gemma(fields, config)
    else:
        config["hidden_act"] = "silu"
    return config


class _Fields:
    """Metadata of one architecture, with its prefix left out."""

    def __init__(self, file_name: str, architecture: str, metadata: Mapping[str, Any]) -> None:
        self.file_name, self.architecture = file_name, architecture
        self._metadata = metadata

    def count(self, name: str, default: int | None = None) -> int:
        """A positive integer, the same in all layers; without a default it must be there."""
        value = self._metadata.get(f"{self.architecture}.{name}", default)
        if isinstance(value, list):
            if not value or any(item != value[0] for item in value):
                raise ModelRejected(f"{self.file_name}: {name} differs between layers, which is not supported")
            value = value[0]
        if value is None:
            raise ModelRejected(f"{self.file_name} lacks the metadata {self.architecture}.{name}")
        if type(value) is not int or value < 1:
            raise ModelRejected(
                f"{self.file_name}: {self.architecture}.{name} must be a positive integer, not {str(value)[:80]}"
            )
        return value

    def number(self, name: str, default: float | None = None) -> float | None:
        """A number, as the shortest decimal that is the same float32: 1e-05 for 9.99999974737875e-06."""
        value = self._metadata.get(f"{self.architecture}.{name}", default)
        if value is not None and not isinstance(value, int | float):
            raise ModelRejected(f"{self.file_name}: {self.architecture}.{name} must be a number, not {str(value)[:80]}")
        return None if value is None else float(str(np.float32(value)))

    def text(self, name: str, default: str) -> str:
        return str(self._metadata.get(f"{self.architecture}.{name}", default))

    def flags(self, name: str) -> list[bool] | None:
        """A list with one flag for each layer, or None where the file holds no list of that name."""
        value = self._metadata.get(f"{self.architecture}.{name}")
        if not isinstance(value, list):
            return None
        if not all(type(flag) is bool for flag in value):
            raise ModelRejected(f"{self.file_name}: {self.architecture}.{name} must list booleans, not {value[:8]}")
        return value

    def has(self, name: str) -> bool:
        return bool(self._metadata.get(f"{self.architecture}.{name}"))


def _sizes(fields: _Fields) -> dict[str, Any]:
    hidden, num_heads = fields.count("embedding_length"), fields.count("attention.head_count")
    head_dim = fields.count("attention.key_length", hidden // num_heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.count(name, head_dim) != head_dim:
            raise ModelRejected(
                f"{fields.file_name}: {name} is {fields.count(name)}, only {head_dim} is supported here"
            )
    return {
        "hidden_size": hidden,
        "intermediate_size": fields.count("feed_forward_length"),
        "num_hidden_layers": fields.count("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.count("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.count("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon", 1e-6),
    }


def _special_token_ids(file: GgufFile) -> dict[str, int]:
    ids = {name: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    for name, token_id in ids.items():
        if token_id is not None and type(token_id) is not int:
            raise ModelRejected(
                f"{file.name}: tokenizer.ggml.{name}_token_id must be an integer, not {str(token_id)[:80]!r}"
            )
    return {f"{name}_token_id": token_id for name, token_id in ids.items() if token_id is not None}


def _gemma(fields: _Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    """What Gemma has beside. Its score scale is not in the metadata: the largest model of each generation divides by
    hidden size / heads, the others by the head size."""
    largest = config["num_hidden_layers"] == _LARGEST_GEMMA_LAYERS[fields.architecture]
    settings = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]
        if largest
        else config["head_dim"],
        "sliding_window": fields.count("attention.sliding_window", 4096),
        **_gemma_windows(fields),
    }
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        # A file that does not state a cap has the family's own; None would switch it off.
        if (cap := fields.number(name)) is not None:
            settings[name] = cap or None
    if fields.architecture == "gemma3":
        settings["rope_local_base_freq"] = fields.number("rope.freq_base_swa", 10_000.0)
    return settings


def _gemma_windows(fields: _Fields) -> dict[str, Any]:
    """Which layers have a sliding window: a flag for each, or the distance between layers without."""
    name, usual = "attention.sliding_window_pattern", _GEMMA_PATTERNS[fields.architecture]
    if (has_window := fields.flags(name)) is not None:
        return {"layer_types": ["sliding_attention" if flag else "full_attention" for flag in has_window]}
    pattern = fields.count(name, usual)
    if fields.architecture == "gemma3":
        return {"sliding_window_pattern": pattern}
    if pattern != usual:
        raise ModelRejected(f"{fields.file_name}: {fields.architecture}.{name} is {pattern}, only {usual} is supported")
    return {}


def _rope(fields: _Fields, file: GgufFile, head_dim: int) -> dict[str, Any]:
    base = fields.number("rope.freq_base") or 10_000.0
    scaling, divisors = _named_scaling(fields), _divisors(file, head_dim // 2)
    if divisors is not None and (llama3 := _llama3_scaling(file.name, base, divisors)):
        if scaling is not None:
            raise ModelRejected(
                f"{file.name} scales rope by rope_freqs.weight and by metadata ({scaling['rope_type']}); only one of "
                "them is supported"
            )
        scaling = llama3
    return {"rope_theta": base} | ({"rope_scaling": scaling} if scaling else {})


def _divisors(file: GgufFile, num_frequencies: int) -> NDArray[np.float32] | None:
    tensor = file.tensors.get("rope_freqs.weight")
    if tensor is None:
        return None
    if tensor.kind != GGMLQuantizationType.F32 or tensor.shape != (num_frequencies,):
        raise ModelRejected(
            f"{file.name}: rope_freqs.weight must hold {num_frequencies} numbers of type F32, not "
            f"{list(tensor.shape)} of {tensor.kind.name}"
        )
    divisors = tensor.rows.view(np.float32).ravel()
    if not (np.isfinite(divisors) & (divisors > 0)).all():
        raise ModelRejected(f"{file.name}: rope_freqs.weight must hold positive numbers only")
    return divisors


def _named_scaling(fields: _Fields) -> dict[str, Any] | None:
    """As llama.cpp reads it: scaling is linear where no type is named, and `rope.scale_linear` is the older name of its
    factor."""
    kind = fields.text("rope.scaling.type", "linear")
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear")) or 1.0
    if kind == "linear":
        return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = fields.count("rope.scaling.original_context_length", fields.count("context_length"))
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if (value := fields.number(f"rope.scaling.{theirs}")) is not None:
                scaling[ours] = value
        return scaling
    if kind == "none":
        return None
    raise ModelRejected(f"{fields.file_name}: rope scaling {kind!r} is not supported; linear and yarn are")


def _llama3_scaling(name: str, base: float, divisors: NDArray[np.float32]) -> dict[str, Any] | None:
    """The Llama 3 scaling that gives these divisors.

    Between its two bounds the scaling is a line in frequency, so two of its three numbers follow from a fit; all three
    may be multiplied by one constant without effect, and low_freq_factor is taken as 1, as Meta does.
    """
    factor = float(divisors.max())
    if factor == 1.0:
        return None
    per_token = base ** (-np.arange(len(divisors)) / len(divisors)) / (2 * math.pi)
    smooth = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    between = (smooth > 1e-3) & (smooth < 1 - 1e-3)
    candidates = [_LLAMA3_DEFAULTS]
    if between.sum() > 1:
        slope, intercept = np.polyfit(per_token[between], smooth[between], 1)
        if intercept < 0:
            high = 1 - 1 / intercept
            candidates.append((float(round(slope * (high - 1))), 1.0, round(float(high), 3)))
    for trained, low, high in candidates:
        expected = 1 / ((1 - (clipped := ((trained * per_token - low) / (high - low)).clip(0, 1))) / factor + clipped)
        if np.allclose(expected, divisors, rtol=_ROPE_TOLERANCE):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": int(trained),
            }
    raise ModelRejected(f"{name}: rope_freqs.weight follows no Llama 3 scaling; other kinds are not supported")
