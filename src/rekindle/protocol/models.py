"""What is known of an imported base model without opening its weights."""

from __future__ import annotations

from dataclasses import dataclass

from rekindle.protocol.identity import ModelDigest


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """A weight matrix an adapter may bind to. `kind` is "linear" or "embedding"; a linear's weight is
    [out_features, in_features], an embedding's [num_embeddings = in_features, dimension = out_features]."""

    name: str
    kind: str
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class ModelManifest:
    """One imported base model. Files live in one directory: model.safetensors and its checksums, config.json,
    tokenizer.json, tokenizer_config.json and, where the source has them, chat_template.jinja and
    generation_config.json; `manifest.json` is this record.

    `modules` lists, in network order, every matrix an adapter may target, by its Hugging Face name
    ("model.layers.0.self_attn.q_proj", "lm_head", "model.embed_tokens"). `num_bytes` counts tensor bytes.
    `dtype` is the name the safetensors header uses ("BF16", "F16", "F32").
    """

    digest: ModelDigest
    family: str
    dtype: str
    num_parameters: int
    num_bytes: int
    num_layers: int
    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    tied_embeddings: bool
    modules: tuple[ModuleShape, ...]
