"""Merged weights themselves, as copies and in place, against the base's and to the bit."""

from collections.abc import Callable

import pytest
import torch

from rekindle.clock import Clock, ManualClock, SystemClock
from rekindle.engine import merging, weights
from rekindle.engine.adapters import ResidentAdapter
from rekindle.engine.kernels.reference import ReferenceKernels
from rekindle.engine.merging import HEAD, MergedCopies, Place, Unmergeable, merge_linear, mergeable_places
from rekindle.engine.merging_in_place import InPlaceMerge
from rekindle.engine.models.decoder import LINEARS, Decoder, DecoderWeights, linear_names
from rekindle.engine.models.registry import read_architecture, read_config
from rekindle.engine.scheduler.merging import MergeOutcome, MergeState
from rekindle.engine.vectors import PagedVector
from rekindle.engine.weights import Weights
from rekindle.protocol.adapters import LoraBinding
from rekindle.protocol.identity import AdapterDigest
from rekindle.store.model_layout import tensor_shapes
from support.merging import ADAPTERS, BUDGET, MergingEngine, Served

pytest.importorskip("peft")


class TickingClock(ManualClock):
    """A clock by which every piece of a copy takes the same time."""

    PIECE_S = 1.0

    def monotonic_s(self) -> float:
        self.advance(self.PIECE_S)
        return super().monotonic_s()


class Bench:
    """A decoder with weights of its own in plain layout, and adapters as they lie in memory."""

    def __init__(self, served: Served, engine: MergingEngine) -> None:
        config = read_config(served.model_dir)
        self.arch, shapes = read_architecture(config), tensor_shapes(config)
        path = served.model_dir / "model.safetensors"
        self.base = Weights(path, torch.bfloat16, shapes)
        self.model = Decoder(self.arch, Weights(path, torch.bfloat16, shapes), ReferenceKernels(), 256)
        self.served, self.memory = served, engine.engine._adapters
        self.absent: set[AdapterDigest] = set()

    def find(self, digest: AdapterDigest) -> ResidentAdapter | None:
        return None if digest in self.absent else self.memory.find(digest)

    def copies(self, clock: Clock | None = None) -> MergedCopies:
        return MergedCopies(self.model, self.base, self.find, BUDGET, clock or SystemClock())

    def linears(self, model_weights: DecoderWeights | None = None) -> dict[Place, torch.Tensor]:
        chosen = model_weights or self.model.weights
        linears = {
            (i, name): getattr(layer, name).weight_NK for i, layer in enumerate(chosen.layers) for name in LINEARS
        }
        return {**linears, (self.arch.num_layers, HEAD): chosen.head.weight_NK}  # type: ignore[attr-defined]

    def digest(self, name: str) -> AdapterDigest:
        return self.served.manifests[name].digest


@pytest.fixture
def bench(llama: Served, engine_of: Callable[..., MergingEngine]) -> Bench:
    engine = engine_of(llama, dtype="bfloat16", merge_bytes=0)
    engine.load(llama.manifests)
    return Bench(llama, engine)


def write_copy(copies: MergedCopies, digest: AdapterDigest) -> DecoderWeights:
    outcomes = []
    while not outcomes:
        outcomes = copies.advance(digest, 1e-3)
    assert outcomes[-1].state is MergeState.READY
    merged = copies.prepare(digest)
    assert merged is not None and merged.weights is not None
    return merged.weights


def bits(linears: dict[Place, torch.Tensor]) -> dict[Place, torch.Tensor]:
    return {place: weight.view(torch.int16).clone() for place, weight in linears.items()}


def is_same(left: dict[Place, torch.Tensor], right: dict[Place, torch.Tensor]) -> bool:
    return all(torch.equal(left[place], right[place]) for place in left)


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "embedding"])
def test_merged_weights_are_the_sum_rounded_once_and_all_else_is_shared(bench: Bench, name: str) -> None:
    """Compared with float64, rounded: a sum in float32 may fall on the other side of a tie, but rarely."""
    before = bits(bench.linears())
    merged = bench.linears(write_copy(bench.copies(), bench.digest(name)))
    places = mergeable_places(bench.served.manifests[name], bench.arch.num_layers)
    adapter = bench.memory.get(bench.digest(name))
    assert adapter.matrices.vector is not None
    vector = adapter.matrices.vector.double()
    for place, weight_NK in bench.linears().items():
        assert (merged[place] is weight_NK) == (place not in places)
        exact_NK = weight_NK.double()
        for first_row, it in merging.first_rows(place, places.get(place, []), bench.arch):
            a_RK = vector[it.a_offset :][: it.rank * it.in_features].view(it.rank, -1)
            b_RN = vector[it.b_offset :][: it.rank * it.out_features].view(it.rank, -1)
            exact_NK[first_row : first_row + it.out_features] += it.scale * b_RN.T @ a_RK
        differs = merged[place] != exact_NK.bfloat16()
        assert float(differs.double().mean()) < 1e-3
        assert torch.allclose(merged[place].double(), exact_NK, rtol=2**-8 * 1.01, atol=1e-6)
    assert is_same(before, bits(bench.linears()))


def test_a_copy_waits_while_its_adapter_is_out_of_memory_and_then_goes_on(bench: Bench) -> None:
    digest = bench.digest("all-rank-64")
    expected = bits(bench.linears(write_copy(bench.copies(), digest)))
    copies = bench.copies(clock=TickingClock())
    outcomes: list[MergeOutcome] = []
    num_calls = 0
    while not outcomes:
        bench.absent = {digest} if num_calls % 3 else set()
        outcomes = copies.advance(digest, TickingClock.PIECE_S / merging._BUILD_SHARE)
        num_calls += 1
        assert not (outcomes and bench.absent)
    assert num_calls > 30, "a piece at a time"
    bench.absent = set()
    merged = copies.prepare(digest)
    assert merged is not None and is_same(expected, bits(bench.linears(merged.weights)))
    bench.absent = {digest}
    assert copies.prepare(digest) is None, "without its matrices, other rows could not be computed"


def test_a_copy_that_is_no_longer_wanted_is_given_up(bench: Bench) -> None:
    copies = bench.copies()
    copies.advance(bench.digest("attention"), 1e-9)
    assert copies.num_bytes > 0
    assert copies.advance(None, 1e-9) == []
    assert copies.num_bytes == 0
    copies.advance(bench.digest("attention"), 1e-9)
    copies.advance(bench.digest("head"), 1e-9)
    assert copies.num_bytes == merging.adapter_size(bench.served.manifests["head"], bench.arch, 2).merge_bytes


class InPlace:
    """An `InPlaceMerge` over the decoder's own weights."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.merge = InPlaceMerge(bench.model, bench.base, bench.linears(), bench.find, SystemClock())
        self.original = bits(bench.linears())

    def weights(self) -> dict[Place, torch.Tensor]:
        return bits(self.bench.linears())


def test_in_place_weights_equal_a_copy_and_are_restored_to_the_bit(bench: Bench) -> None:
    expected = {
        name: bits(bench.linears(write_copy(bench.copies(), bench.digest(name))))
        for name in ADAPTERS
        if name != "embedding"
    }
    in_place = InPlace(bench)
    for name in ("attention", "head", "all-rank-64", "some-layers"):
        for again in range(2):
            merged = in_place.merge.prepare(bench.digest(name))
            assert merged is not None and merged.digest == bench.digest(name)
            assert is_same(expected[name], in_place.weights())
            states = {outcome.digest: outcome.state for outcome in in_place.merge.advance(None, 0.0)}
            assert states.get(bench.digest(name)) is (None if again else MergeState.READY)
        if name == "head":
            assert in_place.merge.prepare(None) is None
            assert is_same(in_place.original, in_place.weights())
    assert in_place.merge.prepare(None) is None
    assert is_same(in_place.original, in_place.weights())


def test_in_place_a_refused_adapter_leaves_the_weights_as_they_were(bench: Bench) -> None:
    in_place = InPlace(bench)
    in_place.merge.prepare(bench.digest("attention"))
    assert in_place.merge.prepare(bench.digest("huge")) is None
    assert is_same(in_place.original, in_place.weights())
    states = [(outcome.digest, outcome.state) for outcome in in_place.merge.advance(None, 0.0)]
    assert states == [
        (bench.digest("attention"), MergeState.READY),
        (bench.digest("attention"), MergeState.RESTORED),
        (bench.digest("huge"), MergeState.REFUSED),
    ]


def test_in_place_an_adapter_that_left_memory_is_unmerged(bench: Bench) -> None:
    in_place = InPlace(bench)
    in_place.merge.prepare(bench.digest("attention"))
    bench.absent = {bench.digest("attention")}
    assert in_place.merge.prepare(bench.digest("attention")) is None
    assert is_same(in_place.original, in_place.weights())


def test_in_place_a_head_that_is_also_the_embedding_is_never_written(bench: Bench) -> None:
    linears = {place: weight for place, weight in bench.linears().items() if place[1] != HEAD}
    original = bits(bench.linears())
    merge = InPlaceMerge(bench.model, bench.base, linears, bench.find, SystemClock())
    assert merge.prepare(bench.digest("head")) is None
    assert "no weight of its own" in merge.advance(None, 0.0)[-1].reason
    assert is_same(original, bits(bench.linears()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("written_bytes", [1, 1000, 1 << 20])
def test_weights_that_are_written_again_are_those_that_were_loaded(
    llama: Served, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, written_bytes: int
) -> None:
    monkeypatch.setattr(weights, "_BLOCK_BYTES", written_bytes)
    source = Weights(llama.model_dir / "model.safetensors", dtype, tensor_shapes(read_config(llama.model_dir)))
    for names in (
        linear_names(1, "qkv", "weight"),
        ["lm_head.weight"],
        ["lm_head.weight", "model.embed_tokens.weight"],
    ):
        loaded = source.rows(names).whole()
        target = torch.full_like(loaded, torch.nan)
        source.write(names, target)
        assert torch.equal(target, loaded)


def test_an_update_that_swells_a_single_output_is_not_merged() -> None:
    """Its norm is small beside the module's, and yet it is large beside that of the row it changes."""
    generator = torch.Generator().manual_seed(0)
    weight, a = torch.randn(64, 32, generator=generator), torch.randn(1, 32, generator=generator)
    b = torch.zeros(1, 64)
    b[0, 5] = 3.0
    binding = LoraBinding("m", "q_proj", 0, 1, 1.0, 32, 64, 0, 32)
    pages = torch.cat((a.flatten(), b.flatten())).view(-1, 16)
    vector = PagedVector(pages, range(len(pages)))
    with pytest.raises(Unmergeable, match="an output of m would grow"):
        list(merge_linear(weight, [(0, binding)], lambda: vector, 256))
