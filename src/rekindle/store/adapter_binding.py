"""Which tensor of a PEFT file belongs to which matrix of the base, and whether together they are the whole adapter.

Pure: works on the configuration, the base's manifest and the tensors' names, types and shapes. An adapter binds
completely or is refused with everything that is wrong with it: what its configuration promises and the file lacks, what
the file holds and nothing uses, and shapes that do not fit the base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from rekindle.errors import AdapterRejected
from rekindle.protocol.models import ModelManifest, ModuleShape
from rekindle.store.peft_config import EMBEDDING, HEAD, PeftConfig, Target, resolve_targets
from rekindle.store.safetensors_file import TensorEntry
from rekindle.store.wording import listed

DTYPES = ("F16", "BF16", "F32")
"""Element types an adapter may have."""

_MAX_SHOWN_NAME = 200
_PREFIX = "base_model.model."
_LINEAR_PART = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(?:\.[^.]+)?\.weight")
_EMBEDDING_PART = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<part>[AB])(?:\.[^.]+)?")
_WHOLE = re.compile(r"(?P<module>.+?)(?P<wrapper>\.base_layer|\.modules_to_save(?:\.[^.]+)?)?\.weight")
_NOT_BUILT = {
    "lora_magnitude_vector": "DoRA",
    "lora_B.bias": "lora_bias",
    ".bias": "trained biases",
    "lora_diag": "KaSA",
    "trainable_tokens_delta": "trainable_token_indices",
}


@dataclass(frozen=True, slots=True)
class LoraTensors:
    """One low-rank update: the names, in the file, of its A and B."""

    target: Target
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class WholeMatrix:
    """A full matrix in the file. PEFT loads a `is_shared` one into the base's own parameter, which a tied base uses
    both as embedding and as output head; the others stand in for one module only."""

    module: ModuleShape
    tensor: str
    is_shared: bool


@dataclass(frozen=True, slots=True)
class Binding:
    """Everything the file holds, assigned; in the base's order of modules."""

    updates: tuple[LoraTensors, ...]
    matrices: tuple[WholeMatrix, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all tensors in use."""
        halves = [name for update in self.updates for name in (update.a, update.b)]
        return (*halves, *(matrix.tensor for matrix in self.matrices))


@dataclass(slots=True)
class _Found:
    """Tensors of the file by what their names say they are."""

    halves: dict[tuple[str, str], str] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


def bind(config: PeftConfig, base: ModelManifest, tensors: Mapping[str, TensorEntry]) -> Binding:
    """Assign every tensor of an adapter's file to a matrix of `base`.

    Raises:
        AdapterRejected: tensors are missing, left over, of the wrong shape or of an unsupported type; the message
            lists them.
    """
    if not tensors:
        raise AdapterRejected("adapter_model.safetensors holds no tensors")
    modules = {module.name: module for module in base.modules}
    targets = {target.module.name: target for target in resolve_targets(config, base.modules)}
    found = _sort_by_name(tensors, modules, targets)
    updates = tuple(
        LoraTensors(target, found.halves[name, "A"], found.halves[name, "B"])
        for name, target in targets.items()
        if {(name, "A"), (name, "B")} <= found.halves.keys()
    )
    matrices = tuple(
        WholeMatrix(modules[name], found.whole[name], is_shared=name not in config.modules_to_save)
        for name in (EMBEDDING, HEAD)
        if name in found.whole
    )
    binding = Binding(updates, matrices)
    problems = [
        *_wrong_types(binding, tensors),
        *_wrong_shapes(binding, tensors),
        *_missing(config, targets, found),
        *_unused(found),
        *_wrong_tying(config, base, binding),
    ]
    if problems:
        raise AdapterRejected("; ".join(problems))
    return binding


def _sort_by_name(
    tensors: Mapping[str, TensorEntry], modules: Mapping[str, ModuleShape], targets: Mapping[str, Target]
) -> _Found:
    found = _Found()
    for name in tensors:
        path = name.removeprefix(_PREFIX)
        if path == name or not _take(name, path, found, modules, targets):
            found.unused.append(name)
    return found


def _take(
    name: str, path: str, found: _Found, modules: Mapping[str, ModuleShape], targets: Mapping[str, Target]
) -> bool:
    """Put one tensor where it belongs; False if there is no such place, or it is taken."""
    for kind, part in (("linear", _LINEAR_PART), ("embedding", _EMBEDDING_PART)):
        if match := part.fullmatch(path):
            target = targets.get(match["module"])
            if target is None or target.module.kind != kind:
                return False
            return found.halves.setdefault((match["module"], match["part"]), name) == name
    match = _WHOLE.fullmatch(path)
    if match and match["module"] in (EMBEDDING, HEAD) and match["module"] in modules:
        return found.whole.setdefault(match["module"], name) == name
    return False


def _wrong_types(binding: Binding, tensors: Mapping[str, TensorEntry]) -> list[str]:
    wrong = [f"{name} ({tensors[name].dtype})" for name in binding.tensors if tensors[name].dtype not in DTYPES]
    return [f"adapters must be of type {', '.join(DTYPES)}; these tensors are not: {listed(wrong)}"] if wrong else []


def _wrong_shapes(binding: Binding, tensors: Mapping[str, TensorEntry]) -> list[str]:
    wrong_rank, wrong_base = [], []
    for update in binding.updates:
        module, rank = update.target.module, update.target.rank
        a, b = tensors[update.a].shape, tensors[update.b].shape
        if (a, b) == ((rank, module.in_features), (module.out_features, rank)):
            continue
        found = f"{module.name}: A {list(a)} and B {list(b)}"
        if len(a) == len(b) == 2 and (a[1], b[0]) == (module.in_features, module.out_features):
            wrong_rank.append(f"{found}, rank {rank} by adapter_config.json")
        else:
            needed = f"[{rank}, {module.in_features}] and [{module.out_features}, {rank}]"
            wrong_base.append(f"{found}, the base needs {needed}")
    for matrix in binding.matrices:
        found_shape, base_shape = list(tensors[matrix.tensor].shape), list(weight_shape(matrix.module))
        if found_shape != base_shape:
            wrong_base.append(f"{matrix.tensor} {found_shape}, the base's matrix is {base_shape}")
    problems = []
    if wrong_base:
        problems.append(f"the adapter was made for another base, or adds rows: {listed(wrong_base, limit=4)}")
    if wrong_rank:
        problems.append(f"ranks differ between file and configuration: {listed(wrong_rank, limit=4)}")
    return problems


def _missing(config: PeftConfig, targets: Mapping[str, Target], found: _Found) -> list[str]:
    if not targets and not config.modules_to_save:
        return ["adapter_config.json targets no module of the base"]
    missing = [
        f"{_PREFIX}{name}.{'lora_embedding_' if target.module.kind == 'embedding' else 'lora_'}{part}"
        for name, target in targets.items()
        for part in "AB"
        if (name, part) not in found.halves
    ]
    missing += [f"{_PREFIX}{name}.weight" for name in config.modules_to_save if name not in found.whole]
    return [f"tensors that adapter_config.json promises and the file lacks: {listed(missing)}"] if missing else []


def _unused(found: _Found) -> list[str]:
    if not found.unused:
        return []
    reasons = sorted({reason for name in found.unused for mark, reason in _NOT_BUILT.items() if mark in name})
    because = f" (they belong to {', '.join(reasons)}, which is not built)" if reasons else ""
    names = listed([name[:_MAX_SHOWN_NAME] for name in found.unused])
    return [f"tensors that bind to nothing the configuration targets in this base: {names}{because}"]


def _wrong_tying(config: PeftConfig, base: ModelManifest, binding: Binding) -> list[str]:
    touched = {update.target.module.name for update in binding.updates} | set(config.modules_to_save)
    if not (config.ties_embeddings and base.tied_embeddings and touched & {EMBEDDING, HEAD}):
        return []
    return [
        "ensure_weight_tying is set and the base's embedding and output head are one matrix: an adapter of both at "
        "once is not built; train without ensure_weight_tying"
    ]


def weight_shape(module: ModuleShape) -> tuple[int, int]:
    """The shape of the module's own weight: [out, in] of a linear layer, [rows, dimension] of an embedding."""
    if module.kind == "embedding":
        return module.in_features, module.out_features
    return module.out_features, module.in_features
