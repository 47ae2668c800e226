"""One call opens an adapter of any kind; what a file does not say is asked for by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_adapters import made_adapter, moved
from peft_oracle import TOLERANCE, base_model, difference, hf_base, logits, logits_of
from safetensors.torch import load_file, save_file
from test_published_kinds import ENTRY, FAMILIES, check, lora_folder, manifest
from tiny import hf_folder
from tiny_quantized import bnb4, quantize

from edgeq.base_fingerprint import take_fingerprint
from edgeq.converters.adapters.gguf_writer import write_lora
from edgeq.converters.adapters.keep import kept_factors
from edgeq.converters.adapters.loram import Removed, recovered, restricted
from edgeq.converters.adapters.open import open_adapter
from edgeq.converters.adapters.peft_writer import by_module, write_coded_folder
from edgeq.converters.gguf.lowering import lower
from edgeq.converters.sources.hf_folder import open_hf_folder
from edgeq.deltas.adapter import Adapter
from edgeq.deltas.decomposed import LoLDU
from edgeq.deltas.lora import LoRA
from edgeq.deltas.merge import merged
from edgeq.errors import EdgeqError, ShapeError, SourceError, UnsupportedError, UsageError
from edgeq.squeeze import squeeze

Weights = dict[str, torch.Tensor]


def options(folder: Path, **values: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "edgeq_adapter.json").write_text(json.dumps({"format": 1, **values}))
    return folder


def nested(*, transposed: bool) -> Weights:
    """LoRA factors of rank 8 for every targeted module, as MatryoshkaLoRA or loralib saves them."""
    generator = torch.Generator().manual_seed(3)
    weights: Weights = {}
    for path, module in hf_base("llama").named_modules():
        if isinstance(module, torch.nn.Linear) and path.split(".")[-1] in FAMILIES["llama"]:
            a, b = torch.randn(8, module.in_features, generator=generator), torch.randn(module.out_features, 8, generator=generator)
            weights[f"{path}.lora_A"] = (0.2 * (a.T if transposed else a)).contiguous()
            weights[f"{path}.lora_B"] = (0.2 * (b.T if transposed else b)).contiguous()
    return weights


@pytest.mark.parametrize(("rank", "strength"), [(3, 3**-0.5), (None, 8**-0.5)])
def test_matryoshka(rank: int | None, strength: float, tmp_path: Path) -> None:
    weights, k = nested(transposed=True), rank or 8
    save_file(weights, options(tmp_path / "mat", kind="MATRYOSHKA", scaling="sqrt", base="tiny") / "any.safetensors")
    adapter = open_adapter(tmp_path / "mat", base_model("llama"), rank=rank)
    assert (adapter.name, adapter.kind, adapter.base_name) == ("mat", "MATRYOSHKA", "tiny")
    check(
        "llama", lambda path, _: strength * (weights[f"{path}.lora_A"][:, :k].double() @ weights[f"{path}.lora_B"][:k].double()).T, adapter
    )


@pytest.mark.parametrize("rank", [3, None])
def test_dylora(rank: int | None, tmp_path: Path) -> None:
    """As the authors' module does it: both factors cut, each times sqrt(r / k), all times alpha / r."""
    weights, k = nested(transposed=False), rank or 8
    options(tmp_path, kind="DYLORA", alpha=12)
    torch.save(weights, tmp_path / "dy.pt")

    def change(path: str, _: torch.nn.Linear) -> torch.Tensor:
        a, b = weights[f"{path}.lora_A"].double(), weights[f"{path}.lora_B"].double()
        root = (8 / k) ** 0.5
        return 12 / 8 * (b[:, :k] * root) @ (a[:k] * root)

    adapter = open_adapter(tmp_path / "dy.pt", base_model("llama"), rank=rank)
    assert (adapter.name, adapter.kind) == ("dy", "DYLORA")
    check("llama", change, adapter)


def test_loldu_and_qwha_and_manifests_are_told_apart(tmp_path: Path) -> None:
    model = base_model("llama")
    save_file(
        {"model.layers.0.mlp.up_proj.parametrizations.weight.0.vector_z": torch.ones(4)},
        options(tmp_path / "l", kind="LOLDU", alpha=8) / "z.safetensors",
    )
    adapter = open_adapter(tmp_path / "l", model, name="x")
    delta = adapter.deltas["layers.0.up.weight"]
    assert adapter.name == "x" and isinstance(delta, LoLDU) and delta.scale == 2
    folder = manifest(tmp_path / "m", deltas={"layers.0.wq.weight": ENTRY})
    assert open_adapter(folder, model).kind == "MANIFEST"
    lora = lora_folder("llama", tmp_path / "p", r=3)
    adapter = open_adapter(lora, model, rank=2)
    assert adapter.kind == "LORA" and "only its first 2 directions are taken" in adapter.notes[-1]
    assert open_adapter(lora, model).notes == ()


@pytest.mark.parametrize("bits", [1, 4])
def test_adapters_in_codes(bits: int, tmp_path: Path) -> None:
    model = base_model("llama")
    source = open_adapter(lora_folder("llama", tmp_path / "a", r=8), model)
    squeezed = squeeze(by_module(model.spec, kept_factors(source, model).factors), bits=bits)
    write_coded_folder(tmp_path / "coded", squeezed, model.spec, base_name="tiny/model")
    adapter = open_adapter(tmp_path / "coded", model)
    expected = {path: module.factors for path, module in squeezed.items()}
    delta, whole = adapter.deltas["layers.0.wv.weight"], expected["model.layers.0.self_attn.v_proj"]
    assert isinstance(delta, LoRA) and whole is not None and adapter.base_name == "tiny/model"
    np.testing.assert_allclose(delta.change(), whole.product(), atol=1e-6)
    (tmp_path / "coded" / "adapter_model.safetensors").touch()
    with pytest.raises(SourceError, match=r"has both adapter_model\.safetensors and adapter_model\.coded\.safetensors"):
        open_adapter(tmp_path / "coded", model)


CHANNELS = {i: torch.randperm(160, generator=torch.Generator().manual_seed(i))[:40] for i in (0, 1)}
ROLES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def loram(folder: Path, *, lists: bool = True) -> Path:
    """A PEFT adapter of the tiny llama without 40 channels in every layer and the second KV head, and its index lists."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = hf_base("llama").config
    config.intermediate_size, config.num_key_value_heads, config.num_attention_heads = 120, 1, 2
    small = get_peft_model(
        AutoModelForCausalLM.from_config(config), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=ROLES)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in small.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    small.save_pretrained(folder)
    for i in (0, 1) if lists else ():
        torch.save({"pruned_idx": CHANNELS[i]}, folder / f"model.layers.{i}.mlp.gate_proj.pt")
        torch.save({"pruned_idx": torch.arange(24, 48)}, folder / f"model.layers.{i}.self_attn.k_proj.pt")
    return folder


def scattered(folder: Path, target: Path) -> Path:
    """The same adapter with full-size tensors, zeros where nothing was trained, for PEFT to load on the full model."""
    weights = load_file(folder / "adapter_model.safetensors")
    full: Weights = {}
    for key, value in weights.items():
        i = int(key.split(".")[4])
        kept = torch.tensor([c for c in range(160) if c not in CHANNELS[i].tolist()])
        heads = {"q_proj": 96, "k_proj": 48, "v_proj": 48}
        role = key.split(".")[-3]
        if key.endswith("lora_B.weight") and role in ("gate_proj", "up_proj", *heads):
            rows = kept if role not in heads else torch.arange(heads[role] // 2)
            full[key] = torch.zeros(heads.get(role, 160), 4)
            full[key][rows] = value
        elif key.endswith("lora_A.weight") and role in ("down_proj", "o_proj"):
            full[key] = torch.zeros(4, 160 if role == "down_proj" else 96)
            full[key][:, kept if role == "down_proj" else torch.arange(48)] = value
        else:
            full[key] = value
    target.mkdir()
    save_file(full, target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    return target


def test_loram_equals_peft_with_scattered_tensors(tmp_path: Path) -> None:
    from peft import PeftModel

    folder = loram(tmp_path / "a")
    adapter = open_adapter(folder, base_model("llama"))
    assert "trained on a pruned model" in adapter.notes[-1]
    wanted = logits(PeftModel.from_pretrained(hf_base("llama"), scattered(folder, tmp_path / "full")).eval())
    assert difference(wanted, logits(hf_base("llama"))) > 0.01
    assert difference(logits_of("llama", merged(base_model("llama"), [(adapter, 1.0)])), wanted) <= TOLERANCE
    with pytest.raises(UsageError, match="LoRAM trains no nested ranks"):
        open_adapter(folder, base_model("llama"), rank=2)


@pytest.mark.parametrize("form", ["removed", "indices"])
def test_loram_lists_elsewhere(form: str, tmp_path: Path) -> None:
    model = base_model("llama")
    expected = open_adapter(loram(tmp_path / "a"), model)
    folder = loram(tmp_path / "b", lists=False)
    with pytest.raises(ShapeError, match=r"adapter_model\.safetensors"):
        open_adapter(folder, model)
    if form == "removed":
        options(folder, kind="LORAM", removed={str(i): {"channels": CHANNELS[i].tolist(), "kv_heads": [1]} for i in (0, 1)})
    else:
        (folder / "lists").mkdir()
        for file in (tmp_path / "a").glob("model.layers.*"):
            (folder / "lists" / file.name).write_bytes(file.read_bytes())
        options(folder, kind="LORAM", indices="lists")
    adapter = open_adapter(folder, model)
    assert adapter.deltas.keys() == expected.deltas.keys()
    for name, delta in adapter.deltas.items():
        same = expected.deltas[name]
        assert isinstance(delta, LoRA) and isinstance(same, LoRA)
        np.testing.assert_array_equal(delta.change(), same.change())


def test_restricting_undoes_recovering(tmp_path: Path) -> None:
    """And on the pruned base, what is restricted gives the logits of the merged model pruned."""
    model = base_model("llama")
    removed = {i: Removed(channels=CHANNELS[i].numpy(), keys=np.arange(24, 48)) for i in (0, 1)}
    full = open_adapter(lora_folder("llama", tmp_path / "f", target_modules=ROLES), model)
    small = restricted(full, model, removed)
    again = restricted(recovered(small, model, removed), model, removed)
    both = merged(model, [(full, 1.0)])
    for name, delta in small.deltas.items():
        other = again.deltas[name]
        assert isinstance(delta, LoRA) and isinstance(other, LoRA)
        np.testing.assert_array_equal(delta.change(), other.change())
        rows, cols = _kept(name)
        pruned = model.tensors[name].decode().astype(np.float64)[rows][:, cols]
        np.testing.assert_allclose(delta.apply(pruned), both.tensors[name].decode()[rows][:, cols], atol=1e-5)
    other_kind = Adapter(name="x", kind="LOLDU", deltas={"layers.0.gate.weight": LoLDU(z=np.ones(2), base_shape=(160, 64), scale=1.0)})
    with pytest.raises(UnsupportedError, match=r"its change of layers\.0\.gate\.weight is no LoRA, so it cannot be cut with the model"):
        restricted(other_kind, model, removed)


def _kept(name: str) -> tuple[Any, Any]:
    i, role = int(name.split(".")[1]), name.split(".")[2]
    channels = np.setdiff1d(np.arange(160), CHANNELS[i].numpy())
    every = np.arange(64)
    return {
        "gate": (channels, every),
        "up": (channels, every),
        "down": (every, channels),
        "wq": (np.arange(48), every),
        "wk": (np.arange(24), every),
        "wv": (np.arange(24), every),
        "wo": (every, np.arange(48)),
    }[role]


LORAM_FAULTS: dict[str, tuple[dict[str, Any], type[EdgeqError], str]] = {
    "outside": ({"indices": "../x"}, SourceError, r"indices is '\.\./x', expected a folder inside"),
    "no lists": ({"indices": "."}, SourceError, r"Name LoRAM's folder"),
    "no object": ({"removed": [1]}, SourceError, "removed must map layer numbers to lists"),
    "layer": ({"removed": {"7": {"channels": [1]}}}, SourceError, "'7' must be a layer from 0 to 1, with whole numbers"),
    "key": ({"removed": {"0": {"rows": [1]}}}, SourceError, "'0' must be a layer from 0 to 1"),
    "range": (
        {"removed": {"0": {"channels": [160]}}},
        ShapeError,
        "layer 0, channels: those taken out must be distinct numbers from 0 to 159",
    ),
    "twice": ({"removed": {"0": {"kv_heads": [1, 1]}}}, ShapeError, "layer 0, rows of k: those taken out must be distinct"),
}


@pytest.mark.parametrize("fault", LORAM_FAULTS)
def test_loram_lists_that_make_no_sense(fault: str, tmp_path: Path) -> None:
    values, error, message = LORAM_FAULTS[fault]
    folder = options(lora_folder("llama", tmp_path / "a"), kind="LORAM", **values)
    with pytest.raises(error, match=message):
        open_adapter(folder, base_model("llama"))


Z = {"model.layers.0.mlp.up_proj.parametrizations.weight.0.vector_z": torch.ones(4)}
UP_A, UP_B = "model.layers.0.mlp.up_proj.lora_A", "model.layers.0.mlp.up_proj.lora_B"
MATRYOSHKA = {UP_A: torch.ones(64, 4), UP_B: torch.ones(4, 160)}
PLAIN = {UP_A: torch.ones(4, 64), UP_B: torch.ones(160, 4)}
SQUARE = {UP_A: torch.ones(64, 64), UP_B: torch.ones(64, 160)}

# fault: tensors, edgeq_adapter.json, message
STATES: dict[str, tuple[Weights, dict[str, Any] | None, str]] = {
    "loldu": (
        Z,
        None,
        r'is a LOLDU adapter and does not say all .* Put edgeq_adapter\.json beside it: \{"format": 1, "kind": "LOLDU", "alpha": 16\}',
    ),
    "loldu without a kind": (Z, {"base": "x"}, "is a LOLDU adapter and does not say all"),
    "loldu without alpha": (Z, {"kind": "LOLDU"}, r"edgeq_adapter\.json: alpha is missing"),
    "matryoshka": (MATRYOSHKA, None, r'is a MATRYOSHKA adapter .*"scaling": "none" \| "linear" \| "sqrt"'),
    "matryoshka scaling": (MATRYOSHKA, {"kind": "MATRYOSHKA", "scaling": 2}, 'scaling is 2, expected "none", "linear" or "sqrt"'),
    "plain": (PLAIN, None, r'is a DYLORA adapter .*"kind": "DYLORA", "alpha": 16'),
    "square": (SQUARE, None, "may be one of DYLORA, MATRYOSHKA and does not say"),
    "wrong kind": (MATRYOSHKA, {"kind": "DYLORA", "alpha": 1}, r"make \[4, 4\], the module here is \[160, 64\]"),
    "another kind": (Z, {"kind": "LORAM"}, "a LORAM adapter is a folder with adapter_config.json; this is a state dict"),
    "no adapter": ({"model.norm.weight": torch.ones(64)}, None, "is no adapter: it has neither LoRA factors nor LoLDU's vectors"),
    "no kind": (Z, {"kind": "LODLU"}, "kind is 'LODLU', expected one of LOLDU, MATRYOSHKA, DYLORA"),
    "version": (Z, {"format": 2}, r"edgeq_adapter\.json: format is 2, this edgeq reads 1"),
    "unused": (Z, {"kind": "LOLDU", "alpha": 1, "scaling": "sqrt"}, "scaling means nothing for LOLDU. Remove it"),
    "base": (Z, {"kind": "LOLDU", "alpha": 1, "base": 5}, "base is 5, expected text"),
}


@pytest.mark.parametrize("fault", STATES)
def test_what_a_state_dict_does_not_say(fault: str, tmp_path: Path) -> None:
    tensors, values, message = STATES[fault]
    save_file(tensors, tmp_path / "a.safetensors")
    if values is not None:
        options(tmp_path, **values)
    with pytest.raises((SourceError, UnsupportedError, ShapeError), match=message):
        open_adapter(tmp_path, base_model("llama"))


def test_forms_that_do_not_go_together(tmp_path: Path) -> None:
    model = base_model("llama")
    folder = lora_folder("llama", tmp_path / "a")
    with pytest.raises(SourceError, match=r"is a part of an adapter\. Name its folder: .*a$"):
        open_adapter(folder / "adapter_model.safetensors", model)
    options(folder, kind="DYLORA", alpha=1)
    with pytest.raises(SourceError, match=r"is an adapter with adapter_config\.json, not a DYLORA adapter as edgeq_adapter\.json says"):
        open_adapter(folder, model)
    options(folder, alpha=1)
    with pytest.raises(SourceError, match=r"alpha means nothing without a kind\. Remove it"):
        open_adapter(folder, model)
    other = manifest(tmp_path / "m", deltas={"layers.0.wq.weight": ENTRY})
    with pytest.raises(UsageError, match="a manifest has no directions to choose from"):
        open_adapter(other, model, rank=1)
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).touch()
    with pytest.raises(SourceError, match="It has 2 state dicts; name one of them"):
        open_adapter(tmp_path, model)
    save_file(Z, options(tmp_path / "z", kind="LOLDU", alpha=1) / "z.safetensors")
    with pytest.raises(UsageError, match="LOLDU trains no nested ranks"):
        open_adapter(tmp_path / "z", model, rank=1)


def test_the_fingerprint_of_the_base_is_compared(tmp_path: Path) -> None:
    model = base_model("llama")
    folder = lora_folder("llama", tmp_path / "a")
    options(folder, base_fingerprint=str(take_fingerprint(model.tensors)))
    adapter = open_adapter(folder, model)
    assert adapter.notes == () and adapter.base_fingerprint == str(take_fingerprint(model.tensors))
    other = open_hf_folder(hf_folder(tmp_path / "m", "llama", seed=8))
    with pytest.raises(SourceError, match="was made for other weights than those of"):
        open_adapter(folder, other)
    assert "was made for other weights" in open_adapter(folder, other, force=True).notes[-1]
    options(folder, base_fingerprint="1:abc")
    with pytest.raises(SourceError, match="its base_fingerprint is '1:abc', which is no fingerprint"):
        open_adapter(folder, model)


def test_a_gguf_file_carries_the_fingerprint(tmp_path: Path) -> None:
    """Of the weights that it is laid out for: an adapter of a sorted model is refused on the model as it was."""
    model = base_model("llama")
    kept = kept_factors(made_adapter(model), model)
    in_order, in_order_kept = moved(model, kept)
    for name, base, factors in (("plain", model, kept), ("sorted", in_order, in_order_kept)):
        stamped = replace(factors, base_fingerprint=str(take_fingerprint(base.tensors)))
        write_lora(tmp_path / f"{name}.gguf", stamped, lower(base))
    assert open_adapter(tmp_path / "plain.gguf", model).notes == ()
    assert open_adapter(tmp_path / "sorted.gguf", in_order).notes == ()
    for name, base in (("plain", in_order), ("sorted", model)):
        with pytest.raises(SourceError, match="was made for other weights"):
            open_adapter(tmp_path / f"{name}.gguf", base)
    options(tmp_path, kind="LOLDU", alpha=1)
    with pytest.raises(SourceError, match=r"is a GGUF adapter, not a LOLDU adapter as edgeq_adapter\.json says"):
        open_adapter(tmp_path / "plain.gguf", model)


@pytest.mark.parametrize("dora", [False, True])
def test_a_qlora_adapter_is_merged_into_what_nf4_decodes_to(dora: bool, tmp_path: Path) -> None:
    """Float64 arithmetic on the dequantized base, not on the weights that it was made from."""
    base = hf_folder(tmp_path / "m", "llama")
    original = {name: tensor.decode() for name, tensor in open_hf_folder(base).tensors.items()}
    decoded = quantize(base, bnb4(nested=True))
    model = open_hf_folder(base)
    folder = lora_folder("llama", tmp_path / "a", use_dora=dora)
    adapter = open_adapter(folder, model)
    weights = load_file(folder / "adapter_model.safetensors")
    result = merged(model, [(adapter, 1.0)])
    for path, name in (("self_attn.q_proj", "wq"), ("mlp.down_proj", "down")):
        module, tensor = f"model.layers.1.{path}", f"layers.1.{name}.weight"
        a, b = (weights[f"base_model.model.{module}.lora_{half}.weight"].double().numpy() for half in "AB")
        wanted = decoded[f"{module}.weight"] + 4 * b @ a
        if dora:
            magnitude = weights[f"base_model.model.{module}.lora_magnitude_vector"].double().numpy()
            wanted *= (magnitude / np.linalg.norm(wanted, axis=1))[:, None]
        np.testing.assert_allclose(result.tensors[tensor].decode(), wanted, rtol=1e-6, atol=1e-7)
        assert np.abs(decoded[f"{module}.weight"] - original[tensor]).max() > 0.01
