"""Import of a PEFT LoRA adapter into the home directory, bound to one base model.

The result is a directory named after the digest of its content: adapter.safetensors, one flat vector whose places the
manifest tells (`rekindle.protocol.adapters`); its checksums; manifest.json; config.json, the adapter's own
adapter_config.json; and chat_template.jinja if it has one. It appears whole or not at all. An adapter whose tensors
differ in type is stored in the widest of them, float32 where float16 and bfloat16 meet, so that no value changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from rekindle.errors import AdapterRejected, ConfigurationError, ModelRejected
from rekindle.protocol.adapters import ADAPTER_FILE_NAME, ADAPTER_LAYOUT, AdapterManifest
from rekindle.protocol.identity import AdapterDigest
from rekindle.protocol.models import ModelManifest
from rekindle.store.adapter_binding import Binding, WholeMatrix, bind
from rekindle.store.adapter_file import AdapterLayout, PlacedTensor, plan_layout
from rekindle.store.adapter_source import AdapterSource, open_source
from rekindle.store.checksums import write_checked_tensors
from rekindle.store.home import Home
from rekindle.store.model_source import NUMPY_DTYPES, Piece, SourceTensor, converted
from rekindle.store.peft_config import EMBEDDING, HEAD, parse_peft_config
from rekindle.store.safetensors_file import Bytes, TensorStream, tensor_index
from rekindle.store.source_files import TEMPLATE_NAME, file_tensor
from rekindle.units import MIB

MANIFEST_NAME = "manifest.json"

_CONFIG_NAME = "config.json"
_BASE_NAME = "model.safetensors"
_BFLOAT16_EXPONENT = np.uint16(0x7F80)


def import_adapter(source: Path, base: ModelManifest, base_dir: Path, home: Home) -> AdapterManifest:
    """Copy the adapter in directory `source` into `home`; importing the same content again changes nothing.

    `base_dir` is where the base lies. Full copies of its matrices that PEFT saved beside LoRA weights are compared with
    it and left out where they are equal.

    Raises:
        AdapterRejected: the adapter is damaged, incomplete, made for another base or needs what is not built.
            Nothing is left behind.
        ConfigurationError: the disk is full.
    """
    files = open_source(source)
    binding = bind(parse_peft_config(files.config), base, files.tensors)
    binding = _without_copies_of_base(binding, files, base, base_dir)
    layout = plan_layout(binding.updates, binding.matrices)
    dtype = _widest({files.tensors[name].dtype for name in binding.tensors})
    streams = [_stream(placed, files, dtype) for placed in layout.tensors]
    manifest = _manifest(layout, base, dtype)
    template = None if files.chat_template is None else files.chat_template.encode()
    digest = hashlib.sha256(_canonical_description(manifest, template))

    def observe(piece: Bytes) -> None:
        digest.update(piece)

    home.require_free(sum(stream.num_bytes for stream in streams) + len(files.config) + len(template or b"") + MIB)
    with home.atomic_directory() as staging:
        write_checked_tensors(staging.path / ADAPTER_FILE_NAME, streams, metadata={"format": "pt"}, observe=observe)
        manifest = replace(manifest, digest=AdapterDigest(digest.hexdigest()))
        (staging.path / _CONFIG_NAME).write_bytes(files.config)
        (staging.path / MANIFEST_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
        if template is not None:
            (staging.path / TEMPLATE_NAME).write_bytes(template)
        staging.publish(home.adapter_directory(manifest.digest))
    return manifest


def _without_copies_of_base(binding: Binding, files: AdapterSource, base: ModelManifest, base_dir: Path) -> Binding:
    """The binding without full matrices that equal the base's.

    Raises:
        AdapterRejected: one that differs cannot be served as PEFT would load it.
    """
    kept = [
        matrix
        for matrix in binding.matrices
        if not _equal(files.tensor(matrix.tensor), _base_matrix(matrix, base, base_dir))
    ]
    updated = {update.target.module.name for update in binding.updates}
    if not kept and not updated:
        raise AdapterRejected("the adapter holds nothing but copies of the base's own matrices")
    for matrix in kept:
        if matrix.is_shared and base.tied_embeddings:
            raise AdapterRejected(
                f"{matrix.tensor} differs from the base's matrix, which the base uses as embedding and as output head; "
                "replacing both is not built; save the adapter with save_embedding_layers=False if it was trained on "
                "this base, or name the one it trains in modules_to_save"
            )
        if matrix.module.name == HEAD and HEAD in updated:
            raise AdapterRejected(
                f"{matrix.tensor} differs from the base's output head, and the adapter has a low-rank update of it "
                "too; both at once is not built; save the adapter with save_embedding_layers=False if it was trained "
                "on this base"
            )
    return replace(binding, matrices=tuple(kept))


def _base_matrix(matrix: WholeMatrix, base: ModelManifest, base_dir: Path) -> SourceTensor:
    module = EMBEDDING if base.tied_embeddings else matrix.module.name
    path = base_dir / _BASE_NAME
    try:
        return file_tensor(path, f"{module}.weight", tensor_index(path)[f"{module}.weight"], AdapterRejected)
    except (OSError, KeyError) as error:
        raise ConfigurationError(f"{path} lacks {module}.weight ({error}); import the base model again") from error


def _equal(own: SourceTensor, base: SourceTensor) -> bool:
    """Whether two tensors of one shape are the same after rounding to the type of either."""
    return any(_equal_in(dtype, own, base) for dtype in dict.fromkeys((own.dtype, base.dtype)))


def _equal_in(dtype: str, own: SourceTensor, base: SourceTensor) -> bool:
    pairs = zip(converted(own, dtype), converted(base, dtype), strict=True)
    try:
        return all(np.array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)) for a, b in pairs)
    except ModelRejected:  # a value of one is too large for the type of the other
        return False


def _widest(dtypes: set[str]) -> str:
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def _stream(placed: PlacedTensor, files: AdapterSource, dtype: str) -> TensorStream:
    if placed.source is None:
        return TensorStream(placed.name, dtype, placed.shape, partial(_zeros, placed.shape[0], dtype))
    tensor = files.tensor(placed.source)
    checked = SourceTensor(tensor.name, tensor.dtype, tensor.shape, partial(_finite_pieces, tensor))
    if placed.is_transposed:
        checked = replace(checked, read=partial(_transposed, checked))
    return TensorStream(placed.name, dtype, placed.shape, partial(converted, checked, dtype))


def _zeros(num_elements: int, dtype: str) -> Iterator[bytes]:
    yield bytes(num_elements * NUMPY_DTYPES[dtype].itemsize)


def _transposed(tensor: SourceTensor) -> Iterator[Piece]:
    whole = np.concatenate(list(tensor.read())).reshape(tensor.shape)
    yield np.ascontiguousarray(whole.T).reshape(-1)


def _finite_pieces(tensor: SourceTensor) -> Iterator[Piece]:
    for piece in tensor.read():
        if tensor.dtype == "BF16":
            is_finite = not np.any((piece & _BFLOAT16_EXPONENT) == _BFLOAT16_EXPONENT)
        else:
            is_finite = bool(np.isfinite(piece).all())
        if not is_finite:
            raise AdapterRejected(
                f"{tensor.name} holds values that are not finite (NaN or infinity); its training failed"
            )
        yield piece


def _manifest(layout: AdapterLayout, base: ModelManifest, dtype: str) -> AdapterManifest:
    projections = {binding.projection for binding in layout.bindings}
    projections |= {matrix.projection for matrix in layout.replaced}
    return AdapterManifest(
        digest=AdapterDigest(""),
        base=base.digest,
        dtype=dtype,
        num_elements=layout.num_elements,
        ranks=tuple(sorted({binding.rank for binding in layout.bindings})),
        targets=tuple(sorted(projections)),
        bindings=layout.bindings,
        replaced=layout.replaced,
        layout=ADAPTER_LAYOUT,
    )


def _canonical_description(manifest: AdapterManifest, template: bytes | None) -> bytes:
    """What the digest covers beside the tensor bytes: all that changes what the adapter does."""
    facts = {"manifest": manifest, "template": None if template is None else hashlib.sha256(template).hexdigest()}
    raw = msgspec.json.encode(facts, order="deterministic")
    return len(raw).to_bytes(8, "little") + raw
