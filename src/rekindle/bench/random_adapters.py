"""Adapters with random weights, written as PEFT writes them and imported into a home of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rekindle.errors import InvalidRequest
from rekindle.protocol.adapters import ADAPTER_FILE_NAME, ALIGNMENT_ELEMENTS, AdapterManifest
from rekindle.protocol.models import ModelManifest, ModuleShape
from rekindle.store.adapter_import import import_adapter
from rekindle.store.home import Home
from rekindle.store.safetensors_file import TensorStream, write_tensors

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
_AMPLITUDE = 0.05


class RandomAdapters:
    """Makes adapters of one base under `directory`; the same seeds give the same bytes everywhere."""

    def __init__(self, directory: Path, base: ModelManifest, base_dir: Path) -> None:
        self._directory, self._base, self._base_dir = directory, base, base_dir
        self._home = Home(directory / "home")

    def make(self, rank: int, targets: Sequence[str], seed: int) -> tuple[AdapterManifest, Path]:
        """Write and import one adapter; returns its manifest and the stored file.

        Raises:
            InvalidRequest: the base has no module of a target's name.
            ConfigurationError: the disk is full.
        """
        source = self._directory / "source"
        write_random_adapter(source, self._base, rank, targets, seed)
        manifest = import_adapter(source, self._base, self._base_dir, self._home)
        for file in source.iterdir():
            file.unlink()
        source.rmdir()
        return manifest, self._home.adapter_directory(manifest.digest) / ADAPTER_FILE_NAME

    def num_elements(self, rank: int, targets: Sequence[str]) -> int:
        """Elements of such an adapter.

        Raises:
            InvalidRequest: the base has no module of a target's name.
        """
        modules = _modules(self._base, targets)
        widths = [width for module in modules for width in (module.in_features, module.out_features)]
        return sum(-(-rank * width // ALIGNMENT_ELEMENTS) * ALIGNMENT_ELEMENTS for width in widths)


def write_random_adapter(directory: Path, base: ModelManifest, rank: int, targets: Sequence[str], seed: int) -> None:
    """A PEFT directory with small random weights in bfloat16 on every module whose name ends in one of `targets`.

    Raises:
        InvalidRequest: the base has no module of a target's name.
    """
    draw = np.random.default_rng(seed)
    streams = []
    for module in _modules(base, targets):
        for half, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
            values = (draw.random(shape, np.float32) - 0.5) * (2 * _AMPLITUDE)
            pieces = [(values.view(np.uint32) >> 16).astype(np.uint16).tobytes()]
            name = f"base_model.model.{module.name}.lora_{half}.weight"
            streams.append(TensorStream(name, "BF16", shape, pieces.copy))
    directory.mkdir(parents=True)
    write_tensors(directory / "adapter_model.safetensors", streams)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(targets)}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def _modules(base: ModelManifest, targets: Sequence[str]) -> list[ModuleShape]:
    modules = [module for module in base.modules if module.name.rpartition(".")[2] in targets]
    absent = set(targets) - {module.name.rpartition(".")[2] for module in modules}
    if absent:
        known = sorted({module.name.rpartition(".")[2] for module in base.modules})
        raise InvalidRequest(
            f"the model has no {', '.join(sorted(absent))}; its modules are {', '.join(known)}", field="targets"
        )
    return modules
