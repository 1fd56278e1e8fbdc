"""Random adapters written by PEFT itself: what is bound, with which rank and scale, equals PEFT's own layers."""

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rekindle.errors import AdapterRejected
from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.models import ModelManifest
from rekindle.store.adapter_import import import_adapter
from rekindle.store.home import Home
from rekindle.store.model_import import import_model
from rekindle.store.safetensors_file import read_header
from support.tiny import make_adapter, make_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = [
    r".*\.layers\.[02]\..*_proj",
    r"(?:.*?(?:self_attn|mlp).*?(?:[qkvo]|down)_proj)",
    r"^(?!.*mlp).*(q_proj|o_proj)$",
    r"model\.layers\.\d+\.mlp\.(gate|up)_proj|lm_head",
    r".*embed_tokens|.*v_proj",
]


@dataclass(frozen=True)
class Base:
    """One tiny model as transformers has it and as it was imported."""

    model: Any
    manifest: ModelManifest
    directory: Path
    home: Home


@pytest.fixture(scope="module", params=["llama", "llama-tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Base]:
    root = tmp_path_factory.mktemp(request.param)
    model, home = make_model(request.param, root / "source"), Home(root / "home")
    manifest = import_model(root / "source", home)
    yield Base(model, manifest, home.model_directory(manifest.digest), home)


def draw_config(draw: random.Random) -> dict[str, Any]:
    config: dict[str, Any] = {"r": draw.randint(1, 9), "lora_alpha": draw.randint(1, 40)}
    kind = draw.choice(["endings", "endings", "full names", "pattern", "all", "none"])
    if kind == "endings":
        config["target_modules"] = draw.sample([*LINEARS, "lm_head", "embed_tokens"], draw.randint(1, 6))
    elif kind == "full names":
        names = [f"model.layers.{i}.self_attn.{name}" for i in range(3) for name in LINEARS[:4]]
        config["target_modules"] = [*draw.sample(names, 4), draw.choice(LINEARS)]
    elif kind == "none":
        config["target_modules"] = None
    else:
        config["target_modules"] = draw.choice(PATTERNS) if kind == "pattern" else "all-linear"
    if not isinstance(config["target_modules"], str) and draw.random() < 0.4:
        config["layers_to_transform"] = draw.choice([1, [0, 2], []])
        config["layers_pattern"] = draw.choice([None, "layers", ["h", "layers"], "lay.*"])
    if draw.random() < 0.4:
        config["exclude_modules"] = draw.choice([["k_proj"], ["layers.1.mlp.up_proj"], r".*layers\.2\..*", r"k_proj"])
    if draw.random() < 0.5:
        ranks = {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 11, "^model.layers.0.*": 2, "roj": 5, "lm_head": 6}
        config["rank_pattern"] = {key: ranks[key] for key in sorted(draw.sample(sorted(ranks), 3))}
    if draw.random() < 0.5:
        alphas = {"v_proj": 32, r"(.*\.2\.).*": 5, "embed_tokens": 9, "mlp.(gate|up)_proj": 3, "model": 4}
        config["alpha_pattern"] = {key: alphas[key] for key in sorted(draw.sample(sorted(alphas), 3))}
    if draw.random() < 0.3:
        config["modules_to_save"] = draw.choice([["lm_head"], ["embed_tokens"], ["model.embed_tokens", "lm_head"]])
    config["use_rslora"] = draw.random() < 0.3
    return config


def stored_matrices(home: Home, manifest: AdapterManifest) -> dict[str, torch.Tensor]:
    path = home.adapter_directory(manifest.digest) / "adapter.safetensors"
    content = path.read_bytes()
    return {
        name: torch.frombuffer(bytearray(content[e.offset : e.offset + e.num_bytes]), dtype=torch.float32).view(e.shape)
        for name, e in read_header(path).entries.items()
        if e.num_bytes
    }


def check_against_peft(base: Base, directory: Path, manifest: AdapterManifest) -> None:
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), directory)
    layers = {
        name: module
        for name, module in reloaded.base_model.model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert {(b.module, b.rank, b.scale) for b in manifest.bindings} == {
        (name, layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()
    }
    stored = stored_matrices(base.home, manifest)
    for name, layer in layers.items():
        if name == "model.embed_tokens":
            assert torch.equal(stored[f"{name}.lora_A_transposed.weight"].T, layer.lora_embedding_A["default"])
            assert torch.equal(stored[f"{name}.lora_B.weight"], layer.lora_embedding_B["default"])
        else:
            assert torch.equal(stored[f"{name}.lora_A.weight"], layer.lora_A["default"].weight)
            assert torch.equal(stored[f"{name}.lora_B_transposed.weight"].T, layer.lora_B["default"].weight)
    saved = {
        name: module.modules_to_save["default"].weight
        for name, module in reloaded.base_model.model.named_modules()
        if isinstance(module, peft.utils.ModulesToSaveWrapper)
    }
    assert {matrix.module for matrix in manifest.replaced} == saved.keys()
    for name, weight in saved.items():
        assert torch.equal(stored[f"{name}.weight"], weight)


def test_random_adapters_bind_exactly_as_peft_loads_them(base: Base, tmp_path: Path) -> None:
    draw = random.Random(base.manifest.family + str(base.manifest.tied_embeddings))
    num_checked = 0
    for i in range(20):
        config = draw_config(draw)
        directory = tmp_path / str(i)
        try:
            make_adapter(base.model, directory, seed=i, **config)
        except ValueError as error:  # PEFT refuses to train it: no module is left, or fields that contradict
            assert "arget" in str(error) or "layers_" in str(error), config
            continue
        manifest = import_adapter(directory, base.manifest, base.directory, base.home)
        check_against_peft(base, directory, manifest)
        num_checked += 1
    assert num_checked >= 10


def test_embeddings_saved_whole_although_untrained_are_left_out(base: Base, tmp_path: Path) -> None:
    tuned = make_adapter(base.model, tmp_path / "plain")
    plain = import_adapter(tmp_path / "plain", base.manifest, base.directory, base.home)
    tuned.save_pretrained(tmp_path / "with-embeddings", save_embedding_layers=True)
    assert "model.embed_tokens.weight" in str(
        read_header(tmp_path / "with-embeddings/adapter_model.safetensors").entries
    )
    assert import_adapter(tmp_path / "with-embeddings", base.manifest, base.directory, base.home) == plain


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"modules_to_save": ["norm"]}, "norm"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    ],
)
def test_what_peft_can_train_but_is_not_built_is_refused_by_name(
    base: Base, tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    make_adapter(base.model, tmp_path / "adapter", **config)
    with pytest.raises(AdapterRejected, match=reason):
        import_adapter(tmp_path / "adapter", base.manifest, base.directory, base.home)


def test_an_adapter_of_a_model_with_resized_embeddings_is_refused_with_both_shapes(base: Base, tmp_path: Path) -> None:
    larger = copy.deepcopy(base.model)
    larger.resize_token_embeddings(base.manifest.vocab_size + 3)
    make_adapter(larger, tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    rows = base.manifest.vocab_size
    with pytest.raises(AdapterRejected, match=rf"\[{rows + 3}, 48\], the base's matrix is \[{rows}, 48\]"):
        import_adapter(tmp_path / "adapter", base.manifest, base.directory, base.home)
