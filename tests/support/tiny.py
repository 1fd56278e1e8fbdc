"""Tiny random models of every family, written as Hugging Face directories, and PEFT adapters of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 211
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-biased": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3-rope": ("LlamaConfig", {"rope_parameters": _LLAMA3_ROPE}),
    "llama-yarn-rope": ("LlamaConfig", {"rope_parameters": _YARN_ROPE}),
    "llama-linear-rope": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    ),
    "llama-dynamic-rope": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}},
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral-window": ("MistralConfig", {"sliding_window": 7}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {}),
    "gemma2": ("Gemma2Config", {"sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 8, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2}),
}
"""Every family, and within Llama every variant that takes another path through the code."""


def make_model(name: str, directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Write the tiny model `name` of `CONFIGS` to `directory`, with a tokenizer; returns the transformers model."""
    import transformers

    class_name, changes = CONFIGS[name]
    config = getattr(transformers, class_name)(**{**SIZES, **changes})
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()
    make_visible(model)
    model.save_pretrained(directory)
    make_tokenizer().save(str(directory / "tokenizer.json"))
    return model


def make_visible(model: Any) -> None:
    """Change random weights so that norms differ from one and logits are far apart."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += torch.randn_like(parameter) * 0.1
            else:
                parameter *= 4


def make_tokenizer() -> Any:
    """A byte-level tokenizer whose vocabulary fits the tiny models."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - 3]
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {symbol: i + 3 for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<pad>", "<s>", "</s>")])
    return tokenizer


def make_adapter(model: Any, directory: Path, seed: int = 0, **config: Any) -> Any:
    """Add a LoRA adapter with random, clearly visible weights to a copy of `model`, save it; returns the PEFT model."""
    import copy

    import peft

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **config}
    tuned = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                scale = 1.0 / max(parameter.shape) ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif "modules_to_save" in name:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT announces that it saves embeddings
        tuned.save_pretrained(directory)
    return tuned
