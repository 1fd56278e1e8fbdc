"""The forward pass every family shares.

Suffixes as in `kernels.interface`. The residual stream is one tensor updated in place; each layer reads its normed
copy. Adapters add to the output of the same fused linear that computes the base.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from rekindle.engine.kernels.interface import (
    AttentionBatch,
    Kernels,
    KVPool,
    LoraBatch,
    LoraGroup,
    PackedLinear,
)
from rekindle.engine.models.architecture import Architecture
from rekindle.engine.weights import WeightSource


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's input: token and position of each row, where its keys and values go, and its adapters, if any."""

    token_ids_T: torch.Tensor  # int64 [T]
    positions_T: torch.Tensor  # int64 [T]
    attention: AttentionBatch
    lora: LoraBatch | None


@dataclass(frozen=True, slots=True)
class _Layer:
    """Prepared weights of one layer."""

    norms: dict[str, torch.Tensor]
    qkv: PackedLinear
    output: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear
    query_norm_D: torch.Tensor | None
    key_norm_D: torch.Tensor | None


class Decoder:
    """A decoder-only transformer ready to run: weights packed for `kernels`, rotary tables computed."""

    def __init__(self, arch: Architecture, weights: WeightSource, kernels: Kernels, max_context_tokens: int) -> None:
        self.arch = arch
        self._kernels = kernels
        self._embed_VH = weights.tensor("model.embed_tokens.weight")
        self._dtype = self._embed_VH.dtype
        self._layers = [self._load_layer(weights, layer) for layer in range(arch.num_layers)]
        self._final_norm_H = self._norm_weight(weights, "model.norm.weight")
        head_name = "model.embed_tokens.weight" if arch.tied_embeddings else "lm_head.weight"
        self._head = kernels.pack_linear(weights.tensor(head_name), None)
        tables = [rope.table(max_context_tokens) for rope in arch.ropes]
        self._rope_tables = [(cos.to(weights.device), sin.to(weights.device)) for cos, sin in tables]
        self._embed_scale = torch.tensor(arch.embed_scale, dtype=self._embed_VH.dtype, device=weights.device)
        attention, inner, hidden = arch.attention[0], arch.intermediate_size, arch.hidden_size
        query, key_value = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
        self._qkv_group = LoraGroup(0, (0, query, query + key_value), (query, key_value, key_value))
        self._output_group = LoraGroup(3, (0,), (hidden,))
        self._gate_up_group = LoraGroup(4, (0, inner), (inner, inner))
        self._down_group = LoraGroup(6, (0,), (hidden,))
        self._head_group = LoraGroup(0, (0,), (arch.vocab_size,))

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """Base embeddings [T, H] of the tokens, before the family's scale."""
        return self._embed_VH[token_ids_T]

    def low_rank(self, a_TR: torch.Tensor, b_HR: torch.Tensor, scale: float) -> torch.Tensor:
        """scale * a b^T in float32: what an adapter adds to embeddings."""
        return self._kernels.multiply(a_TR.float(), b_HR.float()) * scale

    def forward(self, embedded_TH: torch.Tensor, batch: ForwardBatch, pool: KVPool) -> torch.Tensor:
        """Run all layers, writing keys and values into `pool`; returns the last hidden
        states, float32 [T, H], not yet normed.

        The residual stream is float32: kept in bfloat16, it would more than double the error of the logits.
        """
        kernels, arch = self._kernels, self.arch
        if arch.embed_scale != 1.0:
            embedded_TH = embedded_TH * self._embed_scale
        residual_TH = embedded_TH.to(torch.float32, copy=True)
        rotations = [(cos[batch.positions_T], sin[batch.positions_T]) for cos, sin in self._rope_tables]
        branch_TH: torch.Tensor | None = None
        for index, layer in enumerate(self._layers):
            norm_H = layer.norms["input_layernorm"]
            if branch_TH is None:
                x_TH = kernels.rms_norm(residual_TH, norm_H, arch.norm_eps, self._dtype)
            else:
                x_TH = kernels.add_rms_norm(branch_TH, residual_TH, norm_H, arch.norm_eps)
            cos_TD, sin_TD = rotations[arch.rope_of[index]]
            branch_TH = self._attend(layer, index, x_TH, cos_TD, sin_TD, batch, pool)
            branch_TH = self._feed_forward(layer, index, branch_TH, residual_TH, batch.lora)
        if branch_TH is not None:
            residual_TH += branch_TH
        return residual_TH

    def logits(self, hidden_RH: torch.Tensor, lora: LoraBatch | None = None) -> torch.Tensor:
        """Final norm and output head for chosen rows; `lora` describes the adapters of these rows. Float32 [R, V]."""
        normed_RH = self._kernels.rms_norm(hidden_RH, self._final_norm_H, self.arch.norm_eps, self._dtype)
        logits_RV = self._head(normed_RH)
        if lora is not None:
            self._kernels.lora(normed_RH, logits_RV, lora, self.arch.num_layers, self._head_group)
        return self._cap(logits_RV.float())

    def logits_with_head(self, hidden_RH: torch.Tensor, head_parts_VH: Iterable[torch.Tensor]) -> torch.Tensor:
        """As `logits`, with another matrix, given in runs of its rows, in place of the base's output head."""
        normed_RH = self._kernels.rms_norm(hidden_RH, self._final_norm_H, self.arch.norm_eps, self._dtype)
        logits_RV = torch.cat([self._kernels.multiply(normed_RH, part_VH) for part_VH in head_parts_VH], dim=1)
        return self._cap(logits_RV.float())

    def _cap(self, logits_RV: torch.Tensor) -> torch.Tensor:
        cap = self.arch.logit_softcap
        return torch.tanh(logits_RV / cap) * cap if cap else logits_RV

    def _attend(
        self,
        layer: _Layer,
        index: int,
        x_TH: torch.Tensor,
        cos_TD: torch.Tensor,
        sin_TD: torch.Tensor,
        batch: ForwardBatch,
        pool: KVPool,
    ) -> torch.Tensor:
        kernels, shape = self._kernels, self.arch.attention[index]
        qkv_TE = layer.qkv(x_TH)
        if batch.lora is not None:
            kernels.lora(x_TH, qkv_TE, batch.lora, index, self._qkv_group)
        if layer.query_norm_D is not None and layer.key_norm_D is not None:
            heads = qkv_TE.view(len(qkv_TE), -1, shape.head_dim)
            query_heads, key_heads = heads[:, : shape.num_heads], heads[:, shape.num_heads :][:, : shape.num_kv_heads]
            query_heads.copy_(kernels.rms_norm(query_heads, layer.query_norm_D, self.arch.norm_eps))
            key_heads.copy_(kernels.rms_norm(key_heads, layer.key_norm_D, self.arch.norm_eps))
        kernels.rope_and_store(qkv_TE, cos_TD, sin_TD, pool, index, batch.attention, shape)
        mixed_TE = kernels.attention(qkv_TE, pool, index, batch.attention, shape)
        out_TH = layer.output(mixed_TE)
        if batch.lora is not None:
            kernels.lora(mixed_TE, out_TH, batch.lora, index, self._output_group)
        return out_TH

    def _feed_forward(
        self, layer: _Layer, index: int, attended_TH: torch.Tensor, residual_TH: torch.Tensor, lora: LoraBatch | None
    ) -> torch.Tensor:
        kernels, eps = self._kernels, self.arch.norm_eps
        norm_H = layer.norms["post_attention_layernorm"]
        if self.arch.sandwich_norms:
            attended_TH = kernels.rms_norm(attended_TH, norm_H, eps)
            norm_H = layer.norms["pre_feedforward_layernorm"]
        x_TH = kernels.add_rms_norm(attended_TH, residual_TH, norm_H, eps)
        gate_up_TF = layer.gate_up(x_TH)
        if lora is not None:
            kernels.lora(x_TH, gate_up_TF, lora, index, self._gate_up_group)
        inner_TF = kernels.gated_activation(gate_up_TF, self.arch.activation)
        out_TH = layer.down(inner_TF)
        if lora is not None:
            kernels.lora(inner_TF, out_TH, lora, index, self._down_group)
        if self.arch.sandwich_norms:
            out_TH = kernels.rms_norm(out_TH, layer.norms["post_feedforward_layernorm"], eps)
        return out_TH

    def _load_layer(self, weights: WeightSource, index: int) -> _Layer:
        prefix = f"model.layers.{index}."

        def linear(*names: str) -> PackedLinear:
            weight_NK = weights.fused([f"{prefix}{name}.weight" for name in names])
            has_bias = weights.has(f"{prefix}{names[0]}.bias")
            bias_N = weights.fused([f"{prefix}{name}.bias" for name in names]) if has_bias else None
            return self._kernels.pack_linear(weight_NK, bias_N)

        attention, mlp = "self_attn.", "mlp."
        return _Layer(
            norms={name: self._norm_weight(weights, f"{prefix}{name}.weight") for name in self.arch.norm_names},
            qkv=linear(attention + "q_proj", attention + "k_proj", attention + "v_proj"),
            output=linear(attention + "o_proj"),
            gate_up=linear(mlp + "gate_proj", mlp + "up_proj"),
            down=linear(mlp + "down_proj"),
            query_norm_D=self._norm_weight(weights, prefix + "self_attn.q_norm.weight") if self.arch.qk_norm else None,
            key_norm_D=self._norm_weight(weights, prefix + "self_attn.k_norm.weight") if self.arch.qk_norm else None,
        )

    def _norm_weight(self, weights: WeightSource, name: str) -> torch.Tensor:
        return weights.tensor(name).float() + self.arch.norm_offset
