"""The demo model's GGUF file, against other libraries' readings of it and against known facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import jinja2
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from rekindle.protocol.models import ModelManifest
from rekindle.store.home import Home
from rekindle.store.model_import import import_model

TEXTS = [
    "",
    " ",
    "\n\n\t \n",
    "Hello, world!",
    "  two leading spaces, two trailing  ",
    "I'm, you're, we'll, they'd; DON'T",
    "naïve café — “quotes” … × ÷",
    "日本語のテキスト、中文和한국어",
    "😀 👩‍👩‍👧 🇫🇷 e\u0301 \u200b zero width",
    "مرحبا بالعالم שלום עולם",
    "def f(x: int) -> int:\n    return x**2  # tab:\t<-\n",
    '{"key": [1,22,333,4444],"π":3.14159}',
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "text<|endoftext|>text <|im_end|> <repo_name>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "The capital of France is Paris. " * 20,
]
"""Texts without digits after spaces: transformers, unlike the publisher, does not split those apart."""

FACTS = {
    "Hello, we can use": [19556, 28, 392, 416, 722],
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "  multiple   spaces": [216, 2701, 256, 5600],
}
"""Tokens of SmolLM2's published tokenizer."""

SAMPLED_LAYERS = ("model.layers.0.", "model.layers.13.", "model.layers.29.")
"""Enough of 30 equal layers: the library takes seconds for all."""

CHAT = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]


@pytest.fixture(scope="module")
def imported(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelManifest, Path]:
    home = Home(tmp_path_factory.mktemp("demo"))
    manifest = import_model(demo_gguf, home)
    return manifest, home.model_directory(manifest.digest)


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


def test_the_demo_model_is_what_its_publisher_says(imported: tuple[ModelManifest, Path]) -> None:
    manifest, directory = imported
    assert (manifest.family, manifest.dtype, manifest.num_layers) == ("llama", "BF16", 30)
    assert (manifest.num_parameters, manifest.vocab_size, manifest.context_length) == (134_515_008, 49_152, 8192)
    assert (manifest.eos_token_ids, manifest.tied_embeddings) == ((2,), True)
    config = json.loads((directory / "config.json").read_text())
    assert (config["rms_norm_eps"], config["rope_parameters"]["rope_theta"]) == (1e-05, 100_000.0)


def test_its_tokenizer_gives_the_published_tokens(imported: tuple[ModelManifest, Path]) -> None:
    tokenizer = Tokenizer.from_file(str(imported[1] / "tokenizer.json"))
    assert {text: tokenizer.encode(text).ids for text in FACTS} == FACTS


def test_its_weights_are_bit_for_bit_those_the_gguf_library_reads(
    imported: tuple[ModelManifest, Path], demo_gguf: Path
) -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    stored = {stored.name: stored for stored in gguf.GGUFReader(demo_gguf).tensors}
    tensors = load_file(imported[1] / "model.safetensors")
    assert len(tensors) == len(stored)
    for name, tensor in tensors.items():
        if ".layers." in name and not name.startswith(SAMPLED_LAYERS):
            continue
        source = stored[names.get_name(name, (".weight",))]
        values = torch.tensor(gguf.dequantize(source.data, source.tensor_type)).bfloat16()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = values.view(-1, 32, 2, 576).transpose(1, 2).reshape(values.shape)
        assert torch.equal(tensor, values), name


def test_its_tokenizer_and_chat_template_agree_with_transformers(
    imported: tuple[ModelManifest, Path], demo_gguf: Path, transformers: Any
) -> None:
    oracle = transformers.AutoTokenizer.from_pretrained(demo_gguf.parent, gguf_file=demo_gguf.name)
    tokenizer = Tokenizer.from_file(str(imported[1] / "tokenizer.json"))
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert ids == oracle(text)["input_ids"], text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    template = jinja2.Environment().from_string((imported[1] / "chat_template.jinja").read_text())
    for prompt in (True, False):
        rendered = oracle.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
        assert template.render(messages=CHAT, add_generation_prompt=prompt) == rendered


def test_the_imported_directory_opens_in_transformers(imported: tuple[ModelManifest, Path], transformers: Any) -> None:
    directory = imported[1]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        (next_id,) = model(**inputs).logits[:, -1].argmax(-1).tolist()
    assert tokenizer.decode(next_id) == " Paris"
