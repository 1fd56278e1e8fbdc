"""A tiny base model and PEFT adapter directories of it, written without PEFT, to be spoiled in every way."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rekindle.protocol.identity import ModelDigest
from rekindle.protocol.models import ModelManifest, ModuleShape

HIDDEN, KEY_VALUE, INNER, VOCABULARY, NUM_LAYERS = 24, 12, 40, 50, 2
LAYER_SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
PREFIX = "base_model.model."


def base_manifest(digest: str = "b" * 64, *, is_tied: bool = False) -> ModelManifest:
    """A Llama of two layers."""
    linears = [
        ModuleShape(f"model.layers.{layer}.{name}", "linear", columns, rows)
        for layer in range(NUM_LAYERS)
        for name, (rows, columns) in LAYER_SHAPES.items()
    ]
    return ModelManifest(
        digest=ModelDigest(digest),
        family="llama",
        dtype="BF16",
        num_parameters=1,
        num_bytes=2,
        num_layers=NUM_LAYERS,
        vocab_size=VOCABULARY,
        context_length=64,
        eos_token_ids=(2,),
        tied_embeddings=is_tied,
        modules=(
            ModuleShape("model.embed_tokens", "embedding", VOCABULARY, HIDDEN),
            *linears,
            ModuleShape("lm_head", "linear", HIDDEN, VOCABULARY),
        ),
    )


@dataclass
class AdapterDirectory:
    """A PEFT adapter directory in the making. `base_matrices` are what the base's own file holds."""

    path: Path
    config: dict[str, Any] = field(default_factory=lambda: {"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    is_tied: bool = False

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self.base = base_manifest(is_tied=self.is_tied)
        self.base_matrices = {"model.embed_tokens.weight": self.random(VOCABULARY, HIDDEN).bfloat16()}
        if not self.is_tied:
            self.base_matrices["lm_head.weight"] = self.random(VOCABULARY, HIDDEN).bfloat16()

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self.dtype)

    def target(self, *names: str, rank: int = 4) -> AdapterDirectory:
        """Add LoRA tensors for all modules with these last parts, and name them in `target_modules`."""
        self.config["target_modules"] = list(names)
        for module in self.base.modules:
            if module.name.split(".")[-1] in names:
                a, b = self.random(rank, module.in_features), self.random(module.out_features, rank)
                if module.kind == "embedding":
                    self.tensors |= {
                        f"{PREFIX}{module.name}.lora_embedding_A": a,
                        f"{PREFIX}{module.name}.lora_embedding_B": b,
                    }
                else:
                    self.tensors |= {
                        f"{PREFIX}{module.name}.lora_A.weight": a,
                        f"{PREFIX}{module.name}.lora_B.weight": b,
                    }
        return self

    def write(self) -> Path:
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "adapter_config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, self.path / "adapter_model.safetensors", metadata={"format": "pt"})
        return self.path

    def write_base(self) -> Path:
        """The base's directory, with only the matrices an import compares."""
        directory = self.path.with_name(self.path.name + "-base")
        directory.mkdir(parents=True, exist_ok=True)
        save_file(self.base_matrices, directory / "model.safetensors")
        return directory
