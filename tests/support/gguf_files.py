"""Tiny models of every architecture as GGUF files, written by the `gguf` library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 256, 512, 8, 4, 32, 7, 2

SHAPES = {
    "attn_q": (HEADS * HEAD_DIM, HIDDEN),
    "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD_DIM),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}
HF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMS = {
    "llama": ("attn_norm", "ffn_norm"),
    "qwen2": ("attn_norm", "ffn_norm"),
    "qwen3": ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm"),
    "gemma2": ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"),
    "gemma3": ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm"),
}


class GgufModel:
    """A tiny model as a GGUF file, to be changed before `write`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.change_to("llama")

    def change_to(self, architecture: str) -> None:
        random = np.random.default_rng(0)
        self.architecture = architecture
        self.tensors: dict[str, np.ndarray[Any, Any]] = {}
        self.kinds: dict[str, Kind] = {}
        self.metadata: dict[str, Any] = {}

        def add(name: str, *shape: int) -> None:
            self.tensors[name] = random.standard_normal(shape, np.float32)

        add("token_embd.weight", VOCAB, HIDDEN)
        for layer in range(LAYERS):
            for name, shape in SHAPES.items():
                add(f"blk.{layer}.{name}.weight", *shape)
            for name in NORMS[architecture]:
                add(f"blk.{layer}.{name}.weight", HEAD_DIM if name in ("attn_q_norm", "attn_k_norm") else HIDDEN)
            if architecture == "qwen2":
                for name in ("attn_q", "attn_k", "attn_v"):
                    add(f"blk.{layer}.{name}.bias", SHAPES[name][0])
        add("output_norm.weight", HIDDEN)

    def write(self) -> Path:
        writer = gguf.GGUFWriter(self.path, self.architecture)
        writer.add_block_count(LAYERS)
        writer.add_context_length(128)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(INNER)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_key_length(HEAD_DIM)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(10_000.0)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(["a", "b", "c", "ab", "<end>", "<turn>", "x"])
        writer.add_token_types([1, 1, 1, 1, 3, 3, 5])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(4)
        for key, value in self.metadata.items():
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, list):
                writer.add_array(key, value)
            else:
                writer.add_uint32(key, value)
        for name, tensor in self.tensors.items():
            kind = self.kinds.get(name)
            writer.add_tensor(name, tensor, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return self.path
