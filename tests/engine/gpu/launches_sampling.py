"""Sampling over vocabularies of real models."""

import torch

from rekindle.engine.kernels.gpu.sampling import choose_on_gpu
from support.logits import draw

LAUNCHES = {
    "greedy": lambda: choose_on_gpu(torch.zeros(1, 262_144), [None]),
    "drawn": lambda: choose_on_gpu(torch.zeros(1, 128_256), [draw(0.5, top_p=0.9)]),
    "drawn, rows not aligned": lambda: choose_on_gpu(torch.zeros(1, 50_257), [draw(0.5, top_p=0.9)]),
}
