"""The stored form of an adapter: one flat vector in plain safetensors, in the order in which a forward pass uses it.

A replaced or updated embedding comes first, the output head last. Within a layer the matrices of q, k and v, of o, of
gate and up, and of down follow one another, in each group all A before all B, so that modules that share their input
are read in one stretch. B of a linear layer is stored transposed: kernels add up multiples of its columns, and rows as
long as the layer is wide keep to aligned blocks whatever the rank. Every matrix starts at a multiple of
`ALIGNMENT_ELEMENTS`; the format allows no gaps, so what is needed in between is a tensor of zeros named `__pad__.<n>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rekindle.protocol.adapters import ALIGNMENT_ELEMENTS, LoraBinding, ReplacedMatrix
from rekindle.store.adapter_binding import LoraTensors, WholeMatrix, weight_shape
from rekindle.store.peft_config import EMBEDDING

PADDING_PREFIX = "__pad__."

_FUSED = {
    "q_proj": 0, "k_proj": 0, "v_proj": 0,
    "o_proj": 1,
    "gate_proj": 2, "up_proj": 2,
    "down_proj": 3,
}  # fmt: skip
_BEFORE_LAYERS, _AFTER_LAYERS = -1, 1 << 30


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor of the stored file. `source` is its name in the adapter's own file, None for padding; `is_transposed`
    says that the source holds its transpose. `offset` counts elements."""

    name: str
    shape: tuple[int, ...]
    offset: int
    source: str | None
    is_transposed: bool = False


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """Where everything goes: the file's tensors in order, and the records that point into them."""

    tensors: tuple[PlacedTensor, ...]
    num_elements: int
    bindings: tuple[LoraBinding, ...]
    replaced: tuple[ReplacedMatrix, ...]


def plan_layout(updates: Sequence[LoraTensors], matrices: Sequence[WholeMatrix]) -> AdapterLayout:
    """Give each matrix its place."""
    file = _FilePlan()
    replaced = [_place_matrix(file, matrix) for matrix in matrices if matrix.module.name == EMBEDDING]
    bindings: list[LoraBinding] = []
    for _, group in groupby(sorted(updates, key=_order), key=_order):
        bindings += _place_group(file, list(group))
    replaced += [_place_matrix(file, matrix) for matrix in matrices if matrix.module.name != EMBEDDING]
    return AdapterLayout(tuple(file.tensors), file.end, tuple(bindings), tuple(replaced))


def layer_and_projection(module: str) -> tuple[int, str]:
    """The layer a module lies in, -1 outside the layers, and the last part of its name."""
    parts = module.split(".")
    layer = next((int(part) for part in parts if part.isdecimal()), -1)
    return layer, parts[-1]


class _FilePlan:
    """The stored file as it grows."""

    def __init__(self) -> None:
        self.tensors: list[PlacedTensor] = []
        self.end = 0

    def place(self, name: str, shape: tuple[int, int], source: str, *, is_transposed: bool = False) -> int:
        """Append a matrix, and zeros up to the next aligned offset; returns its own offset."""
        offset = self.end
        self.tensors.append(PlacedTensor(name, shape, offset, source, is_transposed))
        self.end += shape[0] * shape[1]
        if padding := -self.end % ALIGNMENT_ELEMENTS:
            self.tensors.append(PlacedTensor(f"{PADDING_PREFIX}{len(self.tensors)}", (padding,), self.end, None))
            self.end += padding
        return offset


def _order(update: LoraTensors) -> tuple[int, int]:
    module = update.target.module
    layer, projection = layer_and_projection(module.name)
    if layer < 0:
        return (_BEFORE_LAYERS if module.name == EMBEDDING else _AFTER_LAYERS), 0
    return layer, _FUSED[projection]


def _place_matrix(file: _FilePlan, matrix: WholeMatrix) -> ReplacedMatrix:
    rows, columns = weight_shape(matrix.module)
    name = matrix.module.name
    offset = file.place(f"{name}.weight", (rows, columns), matrix.tensor)
    return ReplacedMatrix(name, layer_and_projection(name)[1], rows, columns, offset)


def _place_group(file: _FilePlan, group: Sequence[LoraTensors]) -> list[LoraBinding]:
    a_offsets = [_place_a(file, update) for update in group]
    b_offsets = [_place_b(file, update) for update in group]
    bindings = []
    for update, a_offset, b_offset in zip(group, a_offsets, b_offsets, strict=True):
        target = update.target
        layer, projection = layer_and_projection(target.module.name)
        bindings.append(
            LoraBinding(
                module=target.module.name,
                projection=projection,
                layer=layer,
                rank=target.rank,
                scale=target.scale,
                in_features=target.module.in_features,
                out_features=target.module.out_features,
                a_offset=a_offset,
                b_offset=b_offset,
            )
        )
    return bindings


def _place_a(file: _FilePlan, update: LoraTensors) -> int:
    module, rank = update.target.module, update.target.rank
    if module.kind == "embedding":
        shape = (module.in_features, rank)
        return file.place(f"{module.name}.lora_A_transposed.weight", shape, update.a, is_transposed=True)
    return file.place(f"{module.name}.lora_A.weight", (rank, module.in_features), update.a)


def _place_b(file: _FilePlan, update: LoraTensors) -> int:
    module, rank = update.target.module, update.target.rank
    if module.kind == "embedding":
        return file.place(f"{module.name}.lora_B.weight", (module.out_features, rank), update.b)
    shape = (rank, module.out_features)
    return file.place(f"{module.name}.lora_B_transposed.weight", shape, update.b, is_transposed=True)
