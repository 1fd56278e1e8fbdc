"""What to measure: the choices of one run, and what every measurement needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rekindle.bench.driver import Adapter, page_bytes
from rekindle.bench.hardware import Hardware
from rekindle.bench.random_adapters import ATTENTION, RandomAdapters
from rekindle.engine.engine import DTYPES
from rekindle.errors import ConfigurationError, InvalidRequest
from rekindle.protocol.replica import EngineSettings
from rekindle.units import format_bytes


@dataclass(frozen=True, slots=True)
class Choices:
    """`ranks` are given to adapters in turn, `targets` to all. `seconds` is the length of each measurement that runs
    against the clock. `rate` is in requests a second; None chooses half of what the engine can serve.

    Raises:
        InvalidRequest: a choice is out of range.
    """

    num_adapters: tuple[int, ...] = (0, 1, 8, 32, 64)
    concurrency: tuple[int, ...] = (1, 8, 32, 64)
    ranks: tuple[int, ...] = (8, 16, 32, 64)
    targets: tuple[str, ...] = ATTENTION
    seconds: float = 8.0
    rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, values, least in (
            ("adapters", self.num_adapters, 0), ("concurrency", self.concurrency, 1), ("ranks", self.ranks, 1),
        ):  # fmt: skip
            if not values or min(values) < least:
                raise InvalidRequest(f"--{name} takes numbers of at least {least}, got {values}", field=name)
        if not 1 <= self.seconds <= 3600:
            raise InvalidRequest(f"--seconds must lie in [1, 3600], got {self.seconds:g}", field="seconds")
        if self.rate is not None and self.rate <= 0:
            raise InvalidRequest(f"--rate must be positive, got {self.rate:g}", field="rate")


@dataclass(frozen=True, slots=True)
class Bench:
    """What every measurement is given. `memory_bytes` bounds a page pool, whose own size each measurement chooses."""

    settings: EngineSettings
    adapters: RandomAdapters
    hardware: Hardware
    choices: Choices
    memory_bytes: int
    say: Callable[[str], None]

    def adapter_bytes(self, rank: int, targets: Sequence[str] | None = None) -> int:
        """Bytes of an adapter in the engine; `targets` are the chosen ones unless given."""
        num_elements = self.adapters.num_elements(rank, targets or self.choices.targets)
        return num_elements * DTYPES[self.settings.dtype].itemsize

    def make_adapters(
        self, ranks: Sequence[int], first_seed: int, targets: Sequence[str] | None = None
    ) -> list[Adapter]:
        """One adapter for each of `ranks`."""
        targets = targets or self.choices.targets
        return [self.adapters.make(rank, targets, first_seed + i) for i, rank in enumerate(ranks)]

    def kv_pages(self, num_sequences: int, num_tokens: int) -> int:
        """Pages of sequences of that length, and the one that the scheduler keeps spare for each."""
        return num_sequences * (-(-num_tokens // self.settings.page_tokens) + 1)

    def pages_of(self, num_bytes: int) -> int:
        """Pages of an adapter of so many bytes."""
        return -(-num_bytes // page_bytes(self.settings))

    def pool_pages(self, what: str, num_bytes: Sequence[int], kv_pages: int) -> int:
        """Pages that adapters of these bytes take beside `kv_pages`.

        Raises:
            ConfigurationError: that is more memory than the run may take.
        """
        num_pages = kv_pages + sum(map(self.pages_of, num_bytes))
        needed = num_pages * page_bytes(self.settings)
        if needed > self.memory_bytes:
            raise ConfigurationError(
                f"{what} takes a page pool of {format_bytes(needed)}, and {format_bytes(self.memory_bytes)} may be "
                "used; ask for fewer adapters or smaller ranks, leave this part out with --only, or raise it with "
                "--set engine.memory"
            )
        return num_pages


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
