"""Low-rank updates at the sizes of an 8B Llama, in every plan."""

from collections.abc import Callable
from functools import partial

import torch

from support.adapter_pages import BoundLora, Segment, paged_lora

QKV, GATE_UP, DOWN, ODD = (4096, (4096, 1024, 1024)), (4096, (14336, 14336)), (14336, (4096,)), (100, (77,))


def update(
    sizes: tuple[int, tuple[int, ...]],
    segments: list[int],
    dtype: torch.dtype,
    max_rank: int | None = None,
    deterministic: bool = False,
) -> None:
    in_features, out_sizes = sizes
    few = [Segment(rows, (8,) * len(out_sizes)) for rows in segments]
    cpu = torch.device("cpu")
    batch, group = paged_lora(few, in_features, out_sizes, dtype=dtype, device=cpu, page_elements=1 << 20)
    num_rows = batch.row_start[-1]
    x, y = torch.empty(num_rows, in_features, dtype=dtype), torch.empty(num_rows, sum(out_sizes), dtype=dtype)
    BoundLora(max_rank, deterministic=deterministic).lora(x, y, batch, 1, group)


LAUNCHES: dict[str, Callable[[], object]] = {
    "decode of one row": partial(update, QKV, [1], torch.bfloat16),
    "decode of many rows": partial(update, GATE_UP, [1] * 64, torch.bfloat16),
    "decode in a graph": partial(update, DOWN, [1] * 8, torch.bfloat16, max_rank=256),
    "prefill": partial(update, QKV, [1, 1000], torch.bfloat16),
    "deterministic": partial(update, QKV, [1, 1000], torch.bfloat16, deterministic=True),
    "odd sizes": partial(update, ODD, [1, 1000], torch.bfloat16),
    "float32": partial(update, QKV, [1, 100], torch.float32),
}
