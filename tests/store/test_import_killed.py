"""An import killed at any moment leaves a home that opens clean and imports again."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from safetensors.torch import load_file

from rekindle.store.home import Home
from rekindle.store.model_import import import_model, read_manifest
from support.llama_directory import LlamaDirectory

IMPORT_FOREVER = """
import sys
from pathlib import Path
from rekindle.store.home import Home
from rekindle.store.model_import import import_model

home = Home(Path(sys.argv[2]))
print("ready", flush=True)
while True:
    manifest = import_model(Path(sys.argv[1]), home)
    home.remove(home.model_directory(manifest.digest))
"""
KILLS = 8
LONGEST_RUN_S = 0.06


def test_an_import_killed_at_any_moment_leaves_a_home_that_starts_cleanly(
    home: Home, llama: LlamaDirectory, left_in: Callable[[Home], list[str]]
) -> None:
    source = llama.write()
    moments = random.Random(7)
    for _ in range(KILLS):
        command = [sys.executable, "-c", IMPORT_FOREVER, str(source), str(home.root)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(moments.uniform(0, LONGEST_RUN_S))
            process.kill()
        home = Home(home.root)
        assert list(home.temporary.iterdir()) == []
        for directory in home.models.iterdir():
            assert read_manifest(directory).digest == directory.name
            tensors = load_file(directory / "model.safetensors")
            assert all(torch.equal(tensors[name], tensor) for name, tensor in llama.weights.items())

    manifest = import_model(source, home)
    assert left_in(home) == [manifest.digest]
