"""The forward pass every family shares.

Suffixes as in `kernels.interface`. The residual stream is one tensor updated in place; each layer reads its normed
copy. Adapters add to the output of the same fused linear that computes the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from rekindle.engine.arena import OWN_ARENA, Arena
from rekindle.engine.kernels.interface import (
    AttentionBatch,
    Kernels,
    KVPool,
    LoraBatch,
    LoraGroup,
    PackedLinear,
    Rows,
    TensorRows,
)
from rekindle.engine.lora_times import LoraTimer
from rekindle.engine.models.architecture import Architecture
from rekindle.engine.weights import WeightSource

LINEARS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The modules that each fused linear of a layer computes, in the order of its outputs."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Prepared weights of one layer."""

    qkv: PackedLinear
    output: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear
    norms: dict[str, torch.Tensor]
    query_norm_D: torch.Tensor | None
    key_norm_D: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """Weights that a step multiplies with: the base's, or a set into which an adapter is merged."""

    layers: tuple[Layer, ...]
    head: PackedLinear


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's input: token and position of each row, where its keys and values go, and its adapters, if any.

    `weights` are used in place of the base's if given; `unmerge` then takes off again, from the rows that do not want
    it, what is merged into them.
    """

    token_ids_T: torch.Tensor  # int64 [T]
    positions_T: torch.Tensor  # int64 [T]
    attention: AttentionBatch
    lora: LoraBatch | None
    unmerge: LoraBatch | None = None
    weights: DecoderWeights | None = None


def head_name(arch: Architecture) -> str:
    """The tensor that the output head multiplies with."""
    return "model.embed_tokens.weight" if arch.tied_embeddings else "lm_head.weight"


class Decoder:
    """A decoder-only transformer ready to run: weights packed for `kernels` in `arena`, rotary tables computed.

    Calls of the lora kernel are marked by `timer`, if there is one.
    """

    def __init__(
        self,
        arch: Architecture,
        weights: WeightSource,
        kernels: Kernels,
        max_context_tokens: int,
        timer: LoraTimer | None = None,
        arena: Arena = OWN_ARENA,
    ) -> None:
        self.arch = arch
        self.kernels = kernels
        self.timer = timer
        self._embed_VH = weights.tensor("model.embed_tokens.weight")
        self._dtype = self._embed_VH.dtype
        self.weights = DecoderWeights(
            layers=tuple(self._load_layer(weights, layer, arena) for layer in range(arch.num_layers)),
            head=kernels.pack_linear(
                TensorRows(self._embed_VH) if arch.tied_embeddings else weights.rows([head_name(arch)]), None, arena
            ),
        )
        self._final_norm_H = self._norm_weight(weights, "model.norm.weight")
        tables = [rope.table(max_context_tokens) for rope in arch.ropes]
        self._rope_tables = [(cos.to(weights.device), sin.to(weights.device)) for cos, sin in tables]
        self._embed_scale = torch.tensor(arch.embed_scale, dtype=self._embed_VH.dtype, device=weights.device)
        query, key_value = arch.query_size, arch.key_value_size
        inner, hidden = arch.intermediate_size, arch.hidden_size
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
        return self.kernels.multiply(a_TR.float(), b_HR.float()) * scale

    def forward(self, embedded_TH: torch.Tensor, batch: ForwardBatch, pool: KVPool) -> torch.Tensor:
        """Run all layers, writing keys and values into `pool`; returns the last hidden
        states, float32 [T, H], not yet normed.

        The residual stream is float32: kept in bfloat16, it would more than double the error of the logits.
        """
        kernels, arch = self.kernels, self.arch
        if arch.embed_scale != 1.0:
            embedded_TH = embedded_TH * self._embed_scale
        residual_TH = embedded_TH.to(torch.float32, copy=True)
        rotations = [(cos[batch.positions_T], sin[batch.positions_T]) for cos, sin in self._rope_tables]
        branch_TH: torch.Tensor | None = None
        for index, layer in enumerate((batch.weights or self.weights).layers):
            norm_H = layer.norms["input_layernorm"]
            if branch_TH is None:
                x_TH = kernels.rms_norm(residual_TH, norm_H, arch.norm_eps, self._dtype)
            else:
                x_TH = kernels.add_rms_norm(branch_TH, residual_TH, norm_H, arch.norm_eps)
            cos_TD, sin_TD = rotations[arch.rope_of[index]]
            branch_TH = self._attend(layer, index, x_TH, cos_TD, sin_TD, batch, pool)
            branch_TH = self._feed_forward(layer, index, branch_TH, residual_TH, batch)
        if branch_TH is not None:
            residual_TH += branch_TH
        return residual_TH

    def logits(
        self,
        hidden_RH: torch.Tensor,
        updates: Sequence[LoraBatch | None] = (),
        weights: DecoderWeights | None = None,
    ) -> torch.Tensor:
        """Final norm and output head for chosen rows, float32 [R, V]; `updates` and `weights` are for these rows what
        `lora`, `unmerge` and `weights` are in `ForwardBatch`."""
        normed_RH = self.kernels.rms_norm(hidden_RH, self._final_norm_H, self.arch.norm_eps, self._dtype)
        logits_RV = (weights or self.weights).head(normed_RH)
        self._update(normed_RH, logits_RV, updates, self.arch.num_layers, self._head_group)
        return self._cap(logits_RV.float())

    def logits_with_head(self, hidden_RH: torch.Tensor, head_parts_VH: Iterable[torch.Tensor]) -> torch.Tensor:
        """As `logits`, with another matrix, given in runs of its rows, in place of the base's output head."""
        normed_RH = self.kernels.rms_norm(hidden_RH, self._final_norm_H, self.arch.norm_eps, self._dtype)
        logits_RV = torch.cat([self.kernels.multiply(normed_RH, part_VH) for part_VH in head_parts_VH], dim=1)
        return self._cap(logits_RV.float())

    def _update(
        self,
        x_TK: torch.Tensor,
        y_TN: torch.Tensor,
        updates: Sequence[LoraBatch | None],
        index: int,
        group: LoraGroup,
    ) -> None:
        """Add what adapters change in the outputs of one fused linear."""
        for batch in updates:
            if batch is None:
                continue
            call = partial(self.kernels.lora, x_TK, y_TN, batch, index, group)
            if self.timer is None:
                call()
            else:
                self.timer.run(index, call)

    def _cap(self, logits_RV: torch.Tensor) -> torch.Tensor:
        cap = self.arch.logit_softcap
        return torch.tanh(logits_RV / cap) * cap if cap else logits_RV

    def _attend(
        self,
        layer: Layer,
        index: int,
        x_TH: torch.Tensor,
        cos_TD: torch.Tensor,
        sin_TD: torch.Tensor,
        batch: ForwardBatch,
        pool: KVPool,
    ) -> torch.Tensor:
        kernels, shape = self.kernels, self.arch.attention[index]
        qkv_TE = layer.qkv(x_TH)
        self._update(x_TH, qkv_TE, (batch.unmerge, batch.lora), index, self._qkv_group)
        if layer.query_norm_D is not None and layer.key_norm_D is not None:
            heads = qkv_TE.view(len(qkv_TE), -1, shape.head_dim)
            query_heads, key_heads = heads[:, : shape.num_heads], heads[:, shape.num_heads :][:, : shape.num_kv_heads]
            query_heads.copy_(kernels.rms_norm(query_heads, layer.query_norm_D, self.arch.norm_eps))
            key_heads.copy_(kernels.rms_norm(key_heads, layer.key_norm_D, self.arch.norm_eps))
        kernels.rope_and_store(qkv_TE, cos_TD, sin_TD, pool, index, batch.attention, shape)
        mixed_TE = kernels.attention(qkv_TE, pool, index, batch.attention, shape)
        out_TH = layer.output(mixed_TE)
        self._update(mixed_TE, out_TH, (batch.unmerge, batch.lora), index, self._output_group)
        return out_TH

    def _feed_forward(
        self, layer: Layer, index: int, attended_TH: torch.Tensor, residual_TH: torch.Tensor, batch: ForwardBatch
    ) -> torch.Tensor:
        kernels, eps = self.kernels, self.arch.norm_eps
        norm_H = layer.norms["post_attention_layernorm"]
        if self.arch.sandwich_norms:
            attended_TH = kernels.rms_norm(attended_TH, norm_H, eps)
            norm_H = layer.norms["pre_feedforward_layernorm"]
        x_TH = kernels.add_rms_norm(attended_TH, residual_TH, norm_H, eps)
        gate_up_TF = layer.gate_up(x_TH)
        self._update(x_TH, gate_up_TF, (batch.unmerge, batch.lora), index, self._gate_up_group)
        inner_TF = kernels.gated_activation(gate_up_TF, self.arch.activation)
        out_TH = layer.down(inner_TF)
        self._update(inner_TF, out_TH, (batch.unmerge, batch.lora), index, self._down_group)
        if self.arch.sandwich_norms:
            out_TH = kernels.rms_norm(out_TH, layer.norms["post_feedforward_layernorm"], eps)
        return out_TH

    def _load_layer(self, weights: WeightSource, index: int, arena: Arena) -> Layer:
        prefix = f"model.layers.{index}."

        def linear(name: str) -> PackedLinear:
            return self.kernels.pack_linear(*linear_rows(weights, index, name), arena)

        return Layer(
            qkv=linear("qkv"),
            output=linear("output"),
            gate_up=linear("gate_up"),
            down=linear("down"),
            norms={name: self._norm_weight(weights, f"{prefix}{name}.weight") for name in self.arch.norm_names},
            query_norm_D=self._norm_weight(weights, prefix + "self_attn.q_norm.weight") if self.arch.qk_norm else None,
            key_norm_D=self._norm_weight(weights, prefix + "self_attn.k_norm.weight") if self.arch.qk_norm else None,
        )

    def _norm_weight(self, weights: WeightSource, name: str) -> torch.Tensor:
        return weights.tensor(name).float() + self.arch.norm_offset


def linear_rows(weights: WeightSource, index: int, name: str) -> tuple[Rows, Rows | None]:
    """Weight and bias, if any, of the fused linear `name` of `LINEARS` in layer `index`."""
    bias_names = linear_names(index, name, "bias")
    bias_N = weights.rows(bias_names) if weights.has(bias_names[0]) else None
    return weights.rows(linear_names(index, name, "weight")), bias_N


def linear_names(index: int, name: str, kind: str) -> list[str]:
    """The tensors of a kind, "weight" or "bias", of the fused linear `name` in layer `index`."""
    return [f"model.layers.{index}.{module}.{kind}" for module in LINEARS[name]]
