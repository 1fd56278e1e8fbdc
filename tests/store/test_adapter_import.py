"""Import of adapters written by hand: what is stored, and each way in which one is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors import safe_open

from rekindle.errors import AdapterRejected, ConfigurationError
from rekindle.protocol.adapters import AdapterManifest
from rekindle.store.adapter_import import import_adapter
from rekindle.store.home import Home
from rekindle.store.safetensors_file import read_header
from support.adapter_files import HIDDEN, PREFIX, VOCABULARY, AdapterDirectory

Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"
EMBEDDING, HEAD = f"{PREFIX}model.embed_tokens", f"{PREFIX}lm_head"


@pytest.fixture
def adapter(tmp_path: Path) -> AdapterDirectory:
    return AdapterDirectory(tmp_path / "adapter").target("q_proj", "v_proj")


def imported(adapter: AdapterDirectory, home: Home) -> AdapterManifest:
    return import_adapter(adapter.write(), adapter.base, adapter.write_base(), home)


def refusal(adapter: AdapterDirectory, home: Home) -> str:
    with pytest.raises(AdapterRejected) as caught:
        imported(adapter, home)
    assert not list(home.adapters.iterdir())
    assert not list(home.temporary.iterdir())
    return str(caught.value)


def stored_vector(home: Home, manifest: AdapterManifest) -> torch.Tensor:
    path = home.adapter_directory(manifest.digest) / "adapter.safetensors"
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[manifest.dtype]
    section = read_header(path).data
    return torch.frombuffer(bytearray(path.read_bytes()[section.offset :]), dtype=dtype)


def matrix(vector: torch.Tensor, offset: int, rows: int, columns: int) -> torch.Tensor:
    return vector[offset : offset + rows * columns].view(rows, columns)


def test_an_adapter_is_stored_as_one_vector_with_its_manifest_and_config(adapter: AdapterDirectory, home: Home) -> None:
    manifest = imported(adapter, home)
    directory = home.adapter_directory(manifest.digest)
    names = ["adapter.safetensors", "adapter.safetensors.xxh3", "config.json", "manifest.json"]
    assert sorted(path.name for path in directory.iterdir()) == names
    assert msgspec.json.decode((directory / "manifest.json").read_bytes(), type=AdapterManifest) == manifest
    assert json.loads((directory / "config.json").read_text()) == adapter.config
    assert (manifest.base, manifest.dtype, manifest.ranks) == (adapter.base.digest, "F32", (4,))
    assert manifest.targets == ("q_proj", "v_proj")
    assert [(b.module, b.projection, b.layer, b.rank, b.scale) for b in manifest.bindings] == [
        (f"model.layers.{layer}.self_attn.{name}", name, layer, 4, 2.0)
        for layer in (0, 1)
        for name in ("q_proj", "v_proj")
    ]
    vector = stored_vector(home, manifest)
    assert len(vector) == manifest.num_elements
    for binding in manifest.bindings:
        a = matrix(vector, binding.a_offset, 4, binding.in_features)
        b = matrix(vector, binding.b_offset, 4, binding.out_features)
        assert torch.equal(a, adapter.tensors[f"{PREFIX}{binding.module}.lora_A.weight"])
        assert torch.equal(b.T, adapter.tensors[f"{PREFIX}{binding.module}.lora_B.weight"])


def test_other_tools_can_read_the_stored_file(adapter: AdapterDirectory, home: Home) -> None:
    manifest = imported(adapter, home)
    with safe_open(home.adapter_directory(manifest.digest) / "adapter.safetensors", "pt") as file:
        stored = file.get_tensor("model.layers.1.self_attn.v_proj.lora_B_transposed.weight")
    assert torch.equal(stored.T, adapter.tensors[f"{PREFIX}model.layers.1.self_attn.v_proj.lora_B.weight"])


def test_an_embedding_update_is_stored_by_token(tmp_path: Path, home: Home) -> None:
    adapter = AdapterDirectory(tmp_path / "adapter").target("embed_tokens", "lm_head", "q_proj")
    manifest = imported(adapter, home)
    assert [binding.projection for binding in manifest.bindings] == ["embed_tokens", "q_proj", "q_proj", "lm_head"]
    embedding = manifest.bindings[0]
    assert (embedding.layer, embedding.in_features, embedding.out_features) == (-1, VOCABULARY, HIDDEN)
    vector = stored_vector(home, manifest)
    a = matrix(vector, embedding.a_offset, VOCABULARY, 4)
    assert torch.equal(a, adapter.tensors[f"{EMBEDDING}.lora_embedding_A"].T)
    assert torch.equal(matrix(vector, embedding.b_offset, HIDDEN, 4), adapter.tensors[f"{EMBEDDING}.lora_embedding_B"])


@pytest.mark.parametrize("infix", [".default", ".my-adapter"])
def test_adapter_names_inside_tensor_names_are_accepted(adapter: AdapterDirectory, home: Home, infix: str) -> None:
    plain = imported(adapter, home)
    adapter.tensors = {
        name.replace(".lora_A", f".lora_A{infix}").replace(".lora_B", f".lora_B{infix}"): tensor
        for name, tensor in adapter.tensors.items()
    }
    assert imported(adapter, home) == plain


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "F16"), (torch.bfloat16, "BF16")])
def test_half_precision_is_kept_as_it_is(tmp_path: Path, home: Home, dtype: torch.dtype, name: str) -> None:
    adapter = AdapterDirectory(tmp_path / "adapter", dtype=dtype).target("o_proj")
    manifest = imported(adapter, home)
    assert manifest.dtype == name
    stored = matrix(stored_vector(home, manifest), manifest.bindings[0].a_offset, 4, HIDDEN)
    assert torch.equal(stored, adapter.tensors[f"{PREFIX}model.layers.0.self_attn.o_proj.lora_A.weight"])


@pytest.mark.parametrize(
    ("others", "widest"), [(torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "F32")]
)
def test_mixed_types_are_widened_without_changing_a_value(
    tmp_path: Path, home: Home, others: torch.dtype, widest: str
) -> None:
    adapter = AdapterDirectory(tmp_path / "adapter", dtype=torch.float16).target("q_proj")
    changed = adapter.tensors[f"{Q0}.lora_B.weight"] = adapter.tensors[f"{Q0}.lora_B.weight"].to(others)
    manifest = imported(adapter, home)
    assert manifest.dtype == widest
    stored = matrix(stored_vector(home, manifest), manifest.bindings[0].b_offset, 4, HIDDEN)
    assert torch.equal(stored.float().T, changed.float())


def test_a_replaced_matrix_is_stored_beside_the_updates(adapter: AdapterDirectory, home: Home) -> None:
    adapter.config["modules_to_save"] = ["lm_head", "embed_tokens"]
    adapter.tensors[f"{HEAD}.weight"] = adapter.random(VOCABULARY, HIDDEN)
    adapter.tensors[f"{EMBEDDING}.modules_to_save.default.weight"] = adapter.random(VOCABULARY, HIDDEN)
    manifest = imported(adapter, home)
    assert manifest.targets == ("embed_tokens", "lm_head", "q_proj", "v_proj")
    assert [record.projection for record in manifest.replaced] == ["embed_tokens", "lm_head"]
    vector = stored_vector(home, manifest)
    for record, name in zip(manifest.replaced, (f"{EMBEDDING}.modules_to_save.default", HEAD), strict=True):
        stored = matrix(vector, record.offset, record.rows, record.columns)
        assert torch.equal(stored, adapter.tensors[f"{name}.weight"])
    assert manifest.replaced[0].offset == 0
    assert manifest.replaced[1].offset > max(binding.b_offset for binding in manifest.bindings)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_copies_of_the_base_that_peft_saves_are_left_out(
    tmp_path: Path, home: Home, dtype: torch.dtype, is_tied: bool
) -> None:
    adapter = AdapterDirectory(tmp_path / "adapter", is_tied=is_tied).target("embed_tokens", "lm_head")
    without = imported(adapter, home)
    head = adapter.base_matrices["model.embed_tokens.weight" if is_tied else "lm_head.weight"]
    adapter.tensors[f"{HEAD}.base_layer.weight"] = head.clone().to(dtype)
    adapter.tensors[f"{EMBEDDING}.base_layer.weight"] = adapter.base_matrices["model.embed_tokens.weight"].to(dtype)
    assert imported(adapter, home) == without


def test_a_copy_that_differs_replaces_the_base_where_that_can_be_served(tmp_path: Path, home: Home) -> None:
    adapter = AdapterDirectory(tmp_path / "adapter").target("embed_tokens")
    other = adapter.base_matrices["model.embed_tokens.weight"].clone()
    other[-1, -1] += 1
    adapter.tensors[f"{EMBEDDING}.base_layer.weight"] = other
    assert [record.projection for record in imported(adapter, home).replaced] == ["embed_tokens"]


def test_a_copy_that_differs_is_refused_where_it_cannot_be_served(tmp_path: Path, home: Home) -> None:
    adapter = AdapterDirectory(tmp_path / "adapter").target("lm_head")
    adapter.tensors[f"{HEAD}.base_layer.weight"] = adapter.random(VOCABULARY, HIDDEN)
    assert "lm_head.base_layer.weight differs" in refusal(adapter, home)
    tied = AdapterDirectory(tmp_path / "tied", is_tied=True).target("q_proj")
    tied.tensors[f"{EMBEDDING}.weight"] = tied.random(VOCABULARY, HIDDEN)
    assert "embed_tokens.weight differs" in refusal(tied, home)


def test_weight_tying_by_the_adapter_is_refused_on_a_tied_base_only(tmp_path: Path, home: Home) -> None:
    for is_tied in (False, True):
        adapter = AdapterDirectory(tmp_path / f"tied-{is_tied}", is_tied=is_tied).target("embed_tokens")
        adapter.config["ensure_weight_tying"] = True
        if is_tied:
            refusal_home = Home(tmp_path / "other-home")
            assert "ensure_weight_tying" in refusal(adapter, refusal_home)
        else:
            assert len(imported(adapter, home).bindings) == 1


def test_the_same_content_has_the_same_digest_and_any_change_another(adapter: AdapterDirectory, home: Home) -> None:
    seen = {imported(adapter, home).digest}
    assert imported(adapter, home).digest in seen
    adapter.config["lora_dropout"] = 0.5
    assert imported(adapter, home).digest in seen
    for change in (
        lambda: adapter.config.update(lora_alpha=9),
        lambda: adapter.config.update(use_rslora=True),
        lambda: adapter.tensors.update({f"{Q0}.lora_A.weight": adapter.random(4, HIDDEN)}),
        lambda: (adapter.path / "chat_template.jinja").write_text("{{ messages }}"),
        lambda: (adapter.path / "chat_template.jinja").write_text("{{ messages }}!"),
    ):
        change()
        digest = imported(adapter, home).digest
        assert digest not in seen
        seen.add(digest)
    assert len(list(home.adapters.iterdir())) == len(seen)


def test_a_chat_template_comes_along_from_either_place(adapter: AdapterDirectory, home: Home) -> None:
    directory = adapter.write()
    for stored in ("from the tokenizer", [{"name": "tool", "template": "x"}, {"name": "default", "template": "named"}]):
        (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": stored}))
        kept = home.adapter_directory(imported(adapter, home).digest) / "chat_template.jinja"
        assert kept.read_text() == ("named" if isinstance(stored, list) else stored)
    (directory / "chat_template.jinja").write_text("its own file")
    kept = home.adapter_directory(imported(adapter, home).digest) / "chat_template.jinja"
    assert kept.read_text() == "its own file"


def test_a_missing_half_is_refused_with_its_name(adapter: AdapterDirectory, home: Home) -> None:
    del adapter.tensors[f"{Q0}.lora_B.weight"]
    assert f"lacks: {Q0}.lora_B" in refusal(adapter, home)


def test_a_promised_module_without_tensors_is_refused_with_the_list(adapter: AdapterDirectory, home: Home) -> None:
    adapter.config["target_modules"].append("up_proj")
    adapter.config["modules_to_save"] = ["lm_head"]
    message = refusal(adapter, home)
    assert "lacks" in message
    assert "layers.1.mlp.up_proj.lora_A" in message
    assert f"{HEAD}.weight" in message


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        (f"{PREFIX}model.layers.0.self_attn.k_proj.lora_A.weight", ""),
        (f"{PREFIX}model.layers.7.self_attn.q_proj.lora_A.weight", ""),
        (f"{Q0}.lora_magnitude_vector", "DoRA"),
        (f"{Q0}.lora_B.bias", "lora_bias"),
        (f"{Q0}.base_layer.bias", "biases"),
        (f"{Q0}.base_layer.weight", ""),
        (f"{Q0}.lora_diag", "KaSA"),
        (f"{EMBEDDING}.token_adapter.trainable_tokens_delta", "trainable_token_indices"),
        (f"{Q0}.lora_embedding_A", ""),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", ""),
        (f"{PREFIX}score.weight", ""),
        ("x" * 1000, ""),
    ],
)
def test_a_tensor_that_binds_to_nothing_is_refused_with_its_name(
    adapter: AdapterDirectory, home: Home, name: str, hint: str
) -> None:
    adapter.tensors[name] = adapter.random(4, HIDDEN)
    message = refusal(adapter, home)
    assert "bind to nothing" in message
    assert name[:200] in message
    assert hint in message


def test_two_tensors_for_one_place_are_refused(adapter: AdapterDirectory, home: Home) -> None:
    adapter.tensors[f"{Q0}.lora_A.second.weight"] = adapter.random(4, HIDDEN)
    message = refusal(adapter, home)
    assert "bind to nothing" in message
    assert f"{Q0}.lora_A" in message


def test_an_adapter_of_another_base_is_refused_with_both_shapes(adapter: AdapterDirectory, home: Home) -> None:
    adapter.tensors[f"{Q0}.lora_A.weight"] = adapter.random(4, 4096)
    adapter.tensors[f"{Q0}.lora_B.weight"] = adapter.random(4096, 4)
    message = refusal(adapter, home)
    assert "another base" in message
    assert "A [4, 4096] and B [4096, 4], the base needs [4, 24] and [24, 4]" in message


def test_a_rank_that_contradicts_the_configuration_is_refused(adapter: AdapterDirectory, home: Home) -> None:
    adapter.config["r"] = 8
    assert "A [4, 24] and B [24, 4], rank 8 by adapter_config.json" in refusal(adapter, home)


def test_extra_rows_of_a_saved_matrix_are_refused_with_both_shapes(adapter: AdapterDirectory, home: Home) -> None:
    adapter.config["modules_to_save"] = ["lm_head"]
    adapter.tensors[f"{HEAD}.weight"] = adapter.random(VOCABULARY + 2, HIDDEN)
    message = refusal(adapter, home)
    assert "adds rows" in message
    assert "lm_head.weight [52, 24], the base's matrix is [50, 24]" in message


@pytest.mark.parametrize("shape", [(4,), (4, HIDDEN, 1), (0, HIDDEN), (4, 0)])
def test_tensors_of_a_wrong_number_of_dimensions_are_refused(
    adapter: AdapterDirectory, home: Home, shape: tuple[int, ...]
) -> None:
    adapter.tensors[f"{Q0}.lora_A.weight"] = torch.zeros(shape)
    assert "q_proj" in refusal(adapter, home)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_other_element_types_are_refused_by_name(adapter: AdapterDirectory, home: Home, dtype: torch.dtype) -> None:
    adapter.tensors[f"{Q0}.lora_A.weight"] = adapter.tensors[f"{Q0}.lora_A.weight"].to(dtype)
    assert "F16, BF16, F32" in refusal(adapter, home)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_with_the_tensor(
    tmp_path: Path, home: Home, dtype: torch.dtype, value: float
) -> None:
    adapter = AdapterDirectory(tmp_path / "adapter", dtype=dtype).target("q_proj")
    adapter.tensors[f"{Q0}.lora_B.weight"][3, 1] = value
    message = refusal(adapter, home)
    assert "q_proj.lora_B" in message
    assert "not finite" in message


@pytest.mark.parametrize("num_bytes", [0, 4, 8, 100, -1, -1000])
def test_a_truncated_file_is_refused_with_its_name(adapter: AdapterDirectory, home: Home, num_bytes: int) -> None:
    path = adapter.write() / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:num_bytes])
    with pytest.raises(AdapterRejected, match=r"adapter_model\.safetensors"):
        import_adapter(adapter.path, adapter.base, adapter.write_base(), home)


def test_an_absurd_header_is_refused_before_it_is_read(adapter: AdapterDirectory, home: Home) -> None:
    path = adapter.write() / "adapter_model.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(AdapterRejected, match="at most 4194304 are allowed"):
        import_adapter(adapter.path, adapter.base, adapter.write_base(), home)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "weights.pkl", "adapter.pth"])
def test_a_pickle_is_refused_by_name_and_never_opened(adapter: AdapterDirectory, home: Home, name: str) -> None:
    directory = adapter.write()
    (directory / "adapter_model.safetensors").unlink()
    (directory / name).write_bytes(b"\x80\x04cposix\nsystem\n")
    (directory / name).chmod(0)
    with pytest.raises(AdapterRejected, match=f"{name}: pickles"):
        import_adapter(directory, adapter.base, adapter.write_base(), home)


def test_a_pickle_beside_safetensors_is_not_looked_at(adapter: AdapterDirectory, home: Home) -> None:
    (adapter.write() / "adapter_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n")
    assert len(imported(adapter, home).bindings) == 4


def test_what_is_no_adapter_directory_is_refused(adapter: AdapterDirectory, home: Home, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for source, reason in (
        (tmp_path / "absent", "not a directory"),
        (adapter.write() / "adapter_config.json", "not a directory"),
        (tmp_path / "empty", "adapter_config.json"),
        (tmp_path / "model", "a whole model"),
    ):
        with pytest.raises(AdapterRejected, match=reason):
            import_adapter(source, adapter.base, adapter.write_base(), home)


def test_an_empty_adapter_and_one_that_targets_nothing_are_refused(adapter: AdapterDirectory, home: Home) -> None:
    tensors, adapter.tensors = adapter.tensors, {}
    assert "no tensors" in refusal(adapter, home)
    adapter.tensors, adapter.config["target_modules"] = tensors, ["c_attn"]
    assert "targets no module" in refusal(adapter, home)


def test_a_full_disk_is_told_before_anything_is_written(
    adapter: AdapterDirectory, home: Home, monkeypatch: pytest.MonkeyPatch, left_in: Callable[[Home], list[str]]
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("rekindle.store.home.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ConfigurationError, match="free"):
        imported(adapter, home)
    assert left_in(home) == []


def test_values_survive_exactly_over_all_bit_patterns_of_bfloat16(tmp_path: Path, home: Home) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    finite = bits[(bits & 0x7F80) != 0x7F80]
    adapter = AdapterDirectory(tmp_path / "adapter").target("q_proj", rank=(len(finite) // HIDDEN))
    adapter.config["r"] = rank = len(finite) // HIDDEN
    values = torch.from_numpy(finite[: rank * HIDDEN].copy()).view(torch.bfloat16).view(rank, HIDDEN)
    adapter.tensors[f"{Q0}.lora_A.weight"] = values
    manifest = imported(adapter, home)
    assert manifest.dtype == "F32"
    stored = matrix(stored_vector(home, manifest), manifest.bindings[0].a_offset, rank, HIDDEN)
    assert torch.equal(stored, values.float())
