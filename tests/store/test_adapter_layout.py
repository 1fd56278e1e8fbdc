"""The stored vector over random adapters: order, alignment, and every value in its place."""

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.protocol.adapters import ALIGNMENT_ELEMENTS, AdapterManifest
from rekindle.store.adapter_import import import_adapter
from rekindle.store.home import Home
from rekindle.store.safetensors_file import DATA_ALIGNMENT_BYTES, read_header
from support.adapter_files import HIDDEN, LAYER_SHAPES, PREFIX, VOCABULARY, AdapterDirectory

PROJECTIONS = [name.split(".")[-1] for name in LAYER_SHAPES]
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

adapters = st.fixed_dictionaries(
    {
        "targets": st.lists(st.sampled_from([*PROJECTIONS, "embed_tokens", "lm_head"]), min_size=1, unique=True),
        "ranks": st.dictionaries(st.sampled_from(PROJECTIONS), st.integers(1, 70)),
        "saved": st.sets(st.sampled_from(["embed_tokens", "lm_head"])),
        "dtype": st.sampled_from(sorted(DTYPES)),
    }
)


def build(path: Path, drawn: dict) -> AdapterDirectory:  # type: ignore[type-arg]
    adapter = AdapterDirectory(path, dtype=DTYPES[drawn["dtype"]])
    targets = [name for name in drawn["targets"] if name not in drawn["saved"]]
    for name in targets:
        adapter.target(name, rank=drawn["ranks"].get(name, 4))
    adapter.config |= {
        "target_modules": targets,
        "rank_pattern": drawn["ranks"],
        "modules_to_save": sorted(drawn["saved"]),
    }
    for name in drawn["saved"]:
        module = "lm_head" if name == "lm_head" else "model.embed_tokens"
        adapter.tensors[f"{PREFIX}{module}.weight"] = adapter.random(VOCABULARY, HIDDEN)
    return adapter


def extents(manifest: AdapterManifest) -> list[tuple[int, int, str, torch.Size]]:
    """(offset, end, name in the source, shape) of every matrix, sorted by offset."""
    found = []
    for binding in manifest.bindings:
        infix = "lora_embedding_" if binding.projection == "embed_tokens" else "lora_"
        ending = "" if binding.projection == "embed_tokens" else ".weight"
        for part, offset, width in (
            ("A", binding.a_offset, binding.in_features),
            ("B", binding.b_offset, binding.out_features),
        ):
            name = f"{PREFIX}{binding.module}.{infix}{part}{ending}"
            is_embedding = binding.projection == "embed_tokens"
            shape = torch.Size((width, binding.rank) if is_embedding else (binding.rank, width))
            found.append((offset, offset + shape.numel(), name, shape))
    for matrix in manifest.replaced:
        shape = torch.Size((matrix.rows, matrix.columns))
        found.append((matrix.offset, matrix.offset + shape.numel(), f"{PREFIX}{matrix.module}.weight", shape))
    return sorted(found)


@settings(max_examples=60, deadline=None)
@given(adapters)
def test_matrices_are_aligned_apart_and_equal_to_their_source(drawn: dict) -> None:  # type: ignore[type-arg]
    with TemporaryDirectory() as directory:
        adapter, home = build(Path(directory, "adapter"), drawn), Home(Path(directory, "home"))
        manifest = import_adapter(adapter.write(), adapter.base, adapter.write_base(), home)
        path = home.adapter_directory(manifest.digest) / "adapter.safetensors"
        header = read_header(path)
        vector = torch.frombuffer(bytearray(path.read_bytes()[header.data.offset :]), dtype=DTYPES[manifest.dtype])
    assert manifest.dtype == drawn["dtype"]
    assert header.data.offset % DATA_ALIGNMENT_BYTES == 0
    assert len(vector) == manifest.num_elements
    assert manifest.num_elements % ALIGNMENT_ELEMENTS == 0
    places = extents(manifest)
    assert len(places) == len(adapter.tensors)
    for (_, end, _, _), (offset, _, _, _) in pairwise([(0, 0, "", torch.Size()), *places]):
        assert end <= offset < end + ALIGNMENT_ELEMENTS
        assert offset % ALIGNMENT_ELEMENTS == 0
        assert not vector[end:offset].any()
    assert manifest.num_elements - places[-1][1] < ALIGNMENT_ELEMENTS
    for offset, end, name, shape in places:
        is_transposed = name.endswith(("lora_embedding_A", "lora_B.weight"))
        source = adapter.tensors[name].T if is_transposed else adapter.tensors[name]
        assert torch.equal(vector[offset:end].view(shape), source)


def test_matrices_lie_in_the_order_of_their_first_use(tmp_path: Path) -> None:
    adapter = AdapterDirectory(tmp_path / "adapter").target(*PROJECTIONS, "lm_head", "embed_tokens")
    home = Home(tmp_path / "home")
    manifest = import_adapter(adapter.write(), adapter.base, adapter.write_base(), home)
    path = home.adapter_directory(manifest.digest) / "adapter.safetensors"
    names = [name for name in read_header(path).entries if not name.startswith("__pad__.")]
    layer = [
        f"{module}.lora_{part}.weight"
        for group in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
        for part in ("A", "B_transposed")
        for module in (next(name for name in LAYER_SHAPES if name.endswith(f".{key}_proj")) for key in group)
    ]
    assert names == [
        "model.embed_tokens.lora_A_transposed.weight",
        "model.embed_tokens.lora_B.weight",
        *(f"model.layers.{i}.{name}" for i in (0, 1) for name in layer),
        "lm_head.lora_A.weight",
        "lm_head.lora_B_transposed.weight",
    ]
