"""Which tensors a model of each family has, in the order in which a forward pass first uses them.

Tensors that an engine fuses (queries, keys and values; gate and up) are adjacent. Knows names and shapes, neither bytes
nor the mathematics of a family.
"""

from __future__ import annotations

from dataclasses import dataclass

from rekindle.protocol.models import ModuleShape
from rekindle.store.model_config import Config, rope_parameters


@dataclass(frozen=True, slots=True)
class _Family:
    """What sets one model family's files apart. `qkv_bias` None: as `attention_bias` says, output projection
    included."""

    qkv_bias: bool | None = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False


_FAMILIES = {
    "llama": _Family(qkv_bias=None, mlp_bias=True),
    "mistral": _Family(),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(qkv_bias=None, qk_norm=True),
    "gemma2": _Family(sandwich_norms=True),
    "gemma3_text": _Family(qk_norm=True, sandwich_norms=True),
}


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, in the order of first use. `config` is resolved."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    in_layer = _layer_shapes(config)
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in in_layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def modules(config: Config) -> tuple[ModuleShape, ...]:
    """Every matrix an adapter may target, in network order; lm_head also where it is tied. `config` is resolved."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    linears = [
        ModuleShape(name.removesuffix(".weight"), "linear", in_features=shape[1], out_features=shape[0])
        for name, shape in tensor_shapes(config).items()
        if len(shape) == 2 and name.startswith("model.layers.")
    ]
    return (
        ModuleShape("model.embed_tokens", "embedding", in_features=vocab, out_features=hidden),
        *linears,
        ModuleShape("lm_head", "linear", in_features=hidden, out_features=vocab),
    )


def context_length(config: Config) -> int:
    """How many tokens the model was made for. Linear and YaRN scaling stretch `max_position_embeddings`, except in
    Gemma 3, whose figure has the stretch in it already. `config` is resolved."""
    length: int = config["max_position_embeddings"]
    (rope, *others) = rope_parameters(config)
    if others:
        return length
    match rope["rope_type"]:
        case "linear":
            return int(length * rope["factor"])
        case "yarn":
            return max(length, int(rope["factor"] * rope["original_max_position_embeddings"]))
        case _:
            return length


def _layer_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    family = _FAMILIES[config["model_type"]]
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    attention_bias = bool(config.get("attention_bias"))
    qkv_bias = attention_bias if family.qkv_bias is None else family.qkv_bias
    mlp_bias = family.mlp_bias and bool(config.get("mlp_bias"))

    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
        shapes[f"self_attn.{name}.weight"] = (rows, hidden)
    if qkv_bias:
        for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
            shapes[f"self_attn.{name}.bias"] = (rows,)
    if family.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (dim,)
    shapes["self_attn.o_proj.weight"] = (hidden, query)
    if family.qkv_bias is None and attention_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    shapes["post_attention_layernorm.weight"] = (hidden,)
    if family.sandwich_norms:
        shapes["pre_feedforward_layernorm.weight"] = (hidden,)
    shapes["mlp.gate_proj.weight"] = shapes["mlp.up_proj.weight"] = (inner, hidden)
    if mlp_bias:
        shapes["mlp.gate_proj.bias"] = shapes["mlp.up_proj.bias"] = (inner,)
    shapes["mlp.down_proj.weight"] = (hidden, inner)
    if mlp_bias:
        shapes["mlp.down_proj.bias"] = (hidden,)
    if family.sandwich_norms:
        shapes["post_feedforward_layernorm.weight"] = (hidden,)
    return shapes
