"""Norms and the gated activation against their specification."""

import pytest
import torch

from rekindle.engine.kernels.gpu.rowwise import MAX_NORM_SIZE, add_rms_norm, gated_activation, rms_norm
from rekindle.engine.kernels.reference import ReferenceKernels
from support.paged import random

REFERENCE = ReferenceKernels()
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
overflows = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # where a GPU says infinity, numpy warns
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the rounding of the last bit; 1 + tanh of the specification loses some where it is almost 0."""
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[found.dtype], atol=1e-5)


@dtypes
@pytest.mark.parametrize(
    ("rows", "size"), [(1, 8), (35, 64), (3, 100), (5, 576), (4, 577), (2, 2304), (3, 4096), (1, MAX_NORM_SIZE)]
)
def test_norms_equal_the_specification(device: torch.device, rows: int, size: int, dtype: torch.dtype) -> None:
    x = random(rows, size, dtype=dtype).to(device)
    weight = random(size, dtype=torch.float32, seed=1).to(device)
    residual = random(rows, size, dtype=torch.float32, seed=2).to(device)
    close(rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))
    close(rms_norm(residual, weight, 1e-5, dtype), REFERENCE.rms_norm(residual, weight, 1e-5, dtype))
    ours, theirs = residual.clone(), residual.clone()
    close(add_rms_norm(x, ours, weight, 1e-5), REFERENCE.add_rms_norm(x, theirs, weight, 1e-5))
    assert torch.equal(ours, theirs)


@dtypes
@pytest.mark.parametrize(("heads", "size"), [(5, 24), (1, 128), (40, 80)])
def test_norms_read_strided_heads(device: torch.device, heads: int, size: int, dtype: torch.dtype) -> None:
    x = random(6, (heads + 4) * size, dtype=dtype).to(device).view(6, heads + 4, size)[:, 2 : 2 + heads]
    weight = random(size, dtype=torch.float32, seed=1).to(device)
    close(rms_norm(x, weight, 1e-6), REFERENCE.rms_norm(x, weight, 1e-6))


def test_norms_take_any_leading_shape(device: torch.device) -> None:
    x, weight = random(2, 3, 4, 16, dtype=torch.float32).to(device), torch.ones(16, device=device)
    close(rms_norm(x, weight, 1e-6), REFERENCE.rms_norm(x, weight, 1e-6))
    close(rms_norm(x[0, 0, 0], weight, 1e-6), REFERENCE.rms_norm(x[0, 0, 0], weight, 1e-6))


@dtypes
def test_rows_of_wider_tensors_are_normed_and_added_in_place(device: torch.device, dtype: torch.dtype) -> None:
    x = random(5, 200, dtype=dtype).to(device)[:, 10:110]
    wide = random(5, 300, dtype=torch.float32, seed=2).to(device)
    ours, theirs = wide.clone(), wide.clone()
    weight = random(100, dtype=torch.float32, seed=1).to(device)
    found = add_rms_norm(x, ours[:, 50:150], weight, 1e-5)
    close(found, REFERENCE.add_rms_norm(x, theirs[:, 50:150], weight, 1e-5))
    assert torch.equal(ours, theirs)


def test_a_normed_row_does_not_depend_on_the_batch(device: torch.device) -> None:
    x, weight = random(21, 64, dtype=torch.float32).to(device), random(64, dtype=torch.float32, seed=1).to(device)
    together = rms_norm(x, weight, 1e-5)
    assert all(torch.equal(together[row : row + 1], rms_norm(x[row : row + 1], weight, 1e-5)) for row in range(21))


def test_a_row_too_long_for_a_program_is_refused(device: torch.device) -> None:
    x, weight = torch.ones(1, MAX_NORM_SIZE + 1, device=device), torch.ones(MAX_NORM_SIZE + 1, device=device)
    with pytest.raises(ValueError, match=str(MAX_NORM_SIZE)):
        rms_norm(x, weight, 1e-5)


@overflows
@dtypes
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "size"), [(1, 8), (7, 100), (3, 1536), (2, 2049)])
def test_gated_activation_equals_the_specification(
    device: torch.device, rows: int, size: int, activation: str, dtype: torch.dtype
) -> None:
    gate_up = random(rows, 2 * size, dtype=dtype).to(device) * 4
    close(gated_activation(gate_up, activation), REFERENCE.gated_activation(gate_up, activation))


@overflows
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_far_from_zero_neither_overflow_nor_vanish(device: torch.device, activation: str) -> None:
    gate = torch.tensor([[-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4]], device=device)
    gate_up = torch.cat((gate, torch.ones_like(gate)), dim=1)
    close(gated_activation(gate_up, activation), REFERENCE.gated_activation(gate_up, activation))


def test_operations_on_no_rows_give_no_rows(device: torch.device) -> None:
    nothing, weight = torch.empty(0, 8, device=device), torch.ones(8, device=device)
    assert rms_norm(nothing, weight, 1e-5).shape == (0, 8)
    assert add_rms_norm(nothing, nothing.clone(), weight, 1e-5).shape == (0, 8)
    assert gated_activation(nothing, "silu").shape == (0, 4)
