"""A tiny Llama as a Hugging Face directory, written by the `safetensors` and `tokenizers` libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE

LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 11,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

Weights = dict[str, torch.Tensor]


def _llama_weights(dtype: torch.dtype) -> Weights:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    weights = {"lm_head.weight": random(11, 16), "model.embed_tokens.weight": random(11, 16)}
    for layer in (1, 0):
        prefix = f"model.layers.{layer}."
        weights |= {
            f"{prefix}mlp.down_proj.weight": random(16, 24),
            f"{prefix}mlp.gate_proj.weight": random(24, 16),
            f"{prefix}mlp.up_proj.weight": random(24, 16),
            f"{prefix}self_attn.k_proj.weight": random(8, 16),
            f"{prefix}self_attn.o_proj.weight": random(16, 16),
            f"{prefix}self_attn.q_proj.weight": random(16, 16),
            f"{prefix}self_attn.v_proj.weight": random(8, 16),
            f"{prefix}input_layernorm.weight": random(16),
            f"{prefix}post_attention_layernorm.weight": random(16),
        }
    return weights | {"model.norm.weight": random(16)}


class LlamaDirectory:
    """A Hugging Face directory of a tiny Llama, to be changed before `write`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = dict(LLAMA_CONFIG)
        self.weights = _llama_weights(torch.bfloat16)
        self.files: dict[str, Any] = {"tokenizer_config.json": {"eos_token": "c"}}

    def write(self, *, num_shards: int = 1) -> Path:
        self.path.mkdir(exist_ok=True)
        self.write_json("config.json", self.config)
        vocabulary = {letter: index for index, letter in enumerate("abcdefghijk")}
        Tokenizer(BPE(vocabulary, [])).save(str(self.path / "tokenizer.json"))
        for name, content in self.files.items():
            self.write_json(name, content)
        if num_shards == 1:
            save_file(self.weights, self.path / "model.safetensors", metadata={"format": "pt"})
            return self.path
        weight_map: dict[str, str] = {}
        names = list(self.weights)
        for shard in range(num_shards):
            file_name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
            held = {name: self.weights[name] for name in names[shard::num_shards]}
            save_file(held, self.path / file_name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(held, file_name)
        self.write_json("model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
        return self.path

    def write_json(self, name: str, content: Any) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        (self.path / name).write_text(text)
