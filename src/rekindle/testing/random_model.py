"""Models and adapters with random weights, made where they are used: for tests and benchmarks that need sizes, not
sense."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from rekindle.engine.kernels.interface import TensorRows
from rekindle.protocol.adapters import ADAPTER_LAYOUT, AdapterManifest
from rekindle.protocol.identity import AdapterDigest, ModelDigest
from rekindle.protocol.models import ModelManifest, ModuleShape
from rekindle.store.adapter_binding import LoraTensors
from rekindle.store.adapter_file import plan_layout
from rekindle.store.model_config import resolve_config
from rekindle.store.model_layout import modules, tensor_shapes
from rekindle.store.peft_config import Target
from rekindle.store.safetensors_file import TensorStream, write_tensors

_DEVIATION = 0.02


class RandomWeights:
    """The tensors of a configuration, normal with `deviation`, norms around 1; the same for the same `drawn_on`, which
    is where they are drawn, their own device unless given. A `rekindle.engine.weights.WeightSource`."""

    def __init__(
        self,
        config: dict[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        *,
        deviation: float = _DEVIATION,
        drawn_on: torch.device | None = None,
    ) -> None:
        self.device, self.dtype = device, dtype
        self._deviation, self._drawn_on = deviation, drawn_on or device
        self._shapes = tensor_shapes(resolve_config(config))
        self._seeds = {name: i for i, name in enumerate(self._shapes)}

    def has(self, name: str) -> bool:
        return name in self._shapes

    def tensor(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        draw = torch.Generator(self._drawn_on).manual_seed(self._seeds[name])
        values = torch.randn(shape, generator=draw, device=self._drawn_on)
        values = values * self._deviation if len(shape) > 1 else 1 + values * _DEVIATION
        return values.to(self.device, self.dtype)

    def rows(self, names: Sequence[str]) -> TensorRows:
        return TensorRows(torch.cat([self.tensor(name) for name in names]))

    def write(self, names: Sequence[str], target: torch.Tensor) -> None:
        target.copy_(self.rows(names).whole())

    def reading(self) -> AbstractContextManager[None]:
        return nullcontext()

    def release_pages(self) -> None:
        """Nothing is kept."""

    def release_pages_of(self, view: torch.Tensor) -> None:
        """Nothing is kept."""


def model_manifest(config: dict[str, Any]) -> ModelManifest:
    """The manifest of a model that exists nowhere."""
    resolved = resolve_config(config)
    num_parameters = sum(prod(shape) for shape in tensor_shapes(resolved).values())
    return ModelManifest(
        digest=ModelDigest("random"),
        family=resolved["model_type"],
        dtype="BF16",
        num_parameters=num_parameters,
        num_bytes=2 * num_parameters,
        num_layers=resolved["num_hidden_layers"],
        vocab_size=resolved["vocab_size"],
        context_length=resolved["max_position_embeddings"],
        eos_token_ids=(),
        tied_embeddings=resolved["tie_word_embeddings"],
        modules=modules(resolved),
    )


def write_adapter(
    model: ModelManifest, targets: Sequence[str], rank: int, path: Path, seed: int = 0
) -> AdapterManifest:
    """Write a bfloat16 adapter of the projections `targets` as a store keeps it. Its digest is empty: see `named`."""

    def tensors(module: ModuleShape) -> LoraTensors:
        return LoraTensors(Target(module, rank, 1.0), f"{module.name}.A", f"{module.name}.B")

    chosen = [module for module in model.modules if module.name.rpartition(".")[2] in targets]
    layout = plan_layout([tensors(module) for module in chosen], [])
    draw = torch.Generator().manual_seed(seed)

    def stream(shape: tuple[int, ...], *, is_padding: bool) -> Iterator[bytes]:
        values = torch.zeros(shape) if is_padding else torch.randn(shape, generator=draw) * _DEVIATION
        yield values.bfloat16().view(torch.uint8).numpy().tobytes()

    write_tensors(
        path,
        [
            TensorStream(
                it.name,
                "BF16",
                it.shape,
                lambda it=it: stream(it.shape, is_padding=it.source is None),  # type: ignore[misc]
            )
            for it in layout.tensors
        ],
    )
    return AdapterManifest(
        digest=AdapterDigest(""),
        base=model.digest,
        dtype="BF16",
        num_elements=layout.num_elements,
        ranks=(rank,),
        targets=tuple(sorted(targets)),
        bindings=layout.bindings,
        layout=ADAPTER_LAYOUT,
    )


def named(manifests: Sequence[tuple[AdapterManifest, Path]], num_adapters: int) -> list[tuple[AdapterManifest, Path]]:
    """So many adapters under digests of their own, which take turns at the given files."""
    turns = itertools.islice(itertools.cycle(manifests), num_adapters)
    return [(replace(it, digest=AdapterDigest(f"adapter-{i}")), path) for i, (it, path) in enumerate(turns)]
