"""Kinds beyond PEFT, against the arithmetic their authors publish, written out with torch here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft_oracle import TOLERANCE, base_model, difference, hf_base, logits, logits_of, make
from safetensors.torch import load_file, save_file
from tiny import edit_json

from edgeq.converters.adapters.loram import read_pruned_indices, recovered
from edgeq.converters.adapters.open import adapter_tokenizer, open_adapter, split_reference
from edgeq.converters.adapters.peft import read_peft_folder
from edgeq.converters.adapters.published import read_loldu, read_manifest, read_matryoshka
from edgeq.deltas.delta import Delta
from edgeq.deltas.lora import LoRA
from edgeq.deltas.merge import merged
from edgeq.errors import EdgeqError, ShapeError, SourceError, UnsupportedError, UsageError

FAMILIES = {"llama": ["q_proj", "v_proj", "down_proj"], "qwen2": ["q_proj", "v_proj", "down_proj"], "phi3": ["qkv_proj", "down_proj"]}
Weights = dict[str, torch.Tensor]


def oracle(family: str, change: Callable[[str, torch.nn.Linear], torch.Tensor]) -> tuple[Any, Any]:
    """Logits of the base, and of the base with `change(path, module)` added to every targeted weight."""
    model = hf_base(family)
    before = logits(model)
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and path.split(".")[-1] in FAMILIES[family]:
                module.weight.add_(change(path, module).float())
    return before, logits(model)


def check(family: str, change: Callable[[str, torch.nn.Linear], torch.Tensor], adapter: Any) -> None:
    before, wanted = oracle(family, change)
    assert difference(before, wanted) > 0.01
    assert difference(logits_of(family, merged(base_model(family), [(adapter, 1.0)])), wanted) <= TOLERANCE


def lora_folder(family: str, folder: Path, **options: Any) -> Path:
    from peft import LoraConfig

    options = {"r": 4, "lora_alpha": 16, "target_modules": FAMILIES[family], **options}
    return make(family, LoraConfig(task_type="CAUSAL_LM", **options), folder, merge=False).folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spelling", ["{path}.default_lora_latent_mapping.weight", "{path}_lora_latent_mapping.weight"])
def test_lora_xs_and_sb(family: str, spelling: str, tmp_path: Path) -> None:
    folder = lora_folder(family, tmp_path / "a")
    weights = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(1)
    paths = sorted({key.split(".lora_")[0] for key in weights})
    cores = {path: torch.randn(4, 4, generator=generator) for path in paths}
    save_file(weights | {spelling.format(path=p): core for p, core in cores.items()}, folder / "adapter_model.safetensors")

    def change(path: str, module: torch.nn.Linear) -> torch.Tensor:
        key = f"base_model.model.{path}"
        return 4.0 * weights[f"{key}.lora_B.weight"].double() @ cores[key].double() @ weights[f"{key}.lora_A.weight"].double()

    adapter = read_peft_folder(folder, base_model(family))
    check(family, change, adapter)
    without_core = oracle(
        family, lambda p, m: 4.0 * weights[f"base_model.model.{p}.lora_B.weight"] @ weights[f"base_model.model.{p}.lora_A.weight"]
    )
    assert difference(without_core[1], logits_of(family, merged(base_model(family), [(adapter, 1.0)]))) > 0.01


def test_a_core_without_its_factors_is_refused(tmp_path: Path) -> None:
    folder = lora_folder("llama", tmp_path / "a")
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = load_file(folder / "adapter_model.safetensors")
    del weights[f"{key}.lora_A.weight"]
    save_file(weights | {f"{key}.default_lora_latent_mapping.weight": torch.ones(4, 4)}, folder / "adapter_model.safetensors")
    with pytest.raises(SourceError, match="has the core of LoRA-XS or LoRA-SB, but not the factors around it"):
        read_peft_folder(folder, base_model("llama"))


def hadamard(n: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


def qwha_folder(folder: Path, n_in: int, path: str) -> Weights:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(96 * n_in, generator=generator)[:50]
    key = f"base_model.model.{path}"
    weights = {
        f"{key}.qhft_spectrum": torch.randn(50, generator=generator),
        f"{key}.qhft_indices_default": torch.stack([places // n_in, places % n_in]),
        f"{key}.qhft_scaling_default": torch.tensor(90.0),
        f"{key}.qhft_n_frequency_default": torch.tensor(50),
        f"{key}.qhft_random_loc_seed_default": torch.tensor(777),
    }
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "QHFT", "target_modules": [path], "n_frequency": 50, "scaling": 90.0, "random_loc_seed": 777}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return weights


def test_qwha(tmp_path: Path) -> None:
    path = "model.layers.1.self_attn.q_proj"
    weights = qwha_folder(tmp_path / "a", 64, path)
    adapter = read_peft_folder(tmp_path / "a", base_model("llama"))
    rows, cols = weights[f"base_model.model.{path}.qhft_indices_default"]
    spectrum = torch.zeros(96, 64, dtype=torch.float64)
    spectrum[rows, cols] = weights[f"base_model.model.{path}.qhft_spectrum"].double()
    wanted = spectrum @ hadamard(64).T / 64 * 90.0 / 96**0.5

    model = hf_base("llama")
    before = logits(model)
    with torch.no_grad():
        model.get_submodule(path).weight.add_(wanted.float())
    assert difference(before, logits(model)) > 0.01
    assert difference(logits_of("llama", merged(base_model("llama"), [(adapter, 1.0)])), logits(model)) <= TOLERANCE


def test_qwha_on_widths_without_a_hadamard_matrix(tmp_path: Path) -> None:
    qwha_folder(tmp_path / "a", 96, "model.layers.1.self_attn.q_proj")
    with pytest.raises(ShapeError, match="QWHA needs inputs of a power of two here, this module has 96"):
        read_peft_folder(tmp_path / "a", base_model("qwen2"))


@pytest.mark.parametrize("family", FAMILIES)
def test_loldu(family: str, tmp_path: Path) -> None:
    """W - s P L_r diag(D_r) U_r + s P L_r diag(z) U_r, with torch's own LU."""
    generator = torch.Generator().manual_seed(2)
    model = hf_base(family)
    vectors = {
        f"{path}.parametrizations.weight.0.vector_z": torch.randn(8, generator=generator)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and path.split(".")[-1] in FAMILIES[family]
    }
    save_file(vectors, tmp_path / "loldu.safetensors")

    def change(path: str, module: torch.nn.Linear) -> torch.Tensor:
        p, low, up = torch.linalg.lu(module.weight.double())
        diagonal = torch.diagonal(up)[:8]
        z = vectors[f"{path}.parametrizations.weight.0.vector_z"].double()
        return 0.5 * p @ low[:, :8] @ torch.diag(z - diagonal) @ (up[:8] / diagonal[:, None])

    adapter = read_loldu(tmp_path / "loldu.safetensors", base_model(family), alpha=4.0)
    check(family, change, adapter)


@pytest.mark.parametrize(("scaling", "strength"), [("none", 1.0), ("linear", 1 / 3), ("sqrt", 3**-0.5)])
def test_matryoshka_slices(scaling: str, strength: float, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    model = hf_base("llama")
    weights: Weights = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and path.split(".")[-1] in FAMILIES["llama"]:
            weights[f"{path}.lora_A"] = 0.3 * torch.randn(module.in_features, 8, generator=generator)
            weights[f"{path}.lora_B"] = 0.3 * torch.randn(8, module.out_features, generator=generator)
    save_file(weights, tmp_path / "m.safetensors")

    def change(path: str, module: torch.nn.Linear) -> torch.Tensor:
        return strength * (weights[f"{path}.lora_A"][:, :3].double() @ weights[f"{path}.lora_B"][:3].double()).T

    check("llama", change, read_matryoshka(tmp_path / "m.safetensors", base_model("llama"), rank=3, scaling=scaling))
    with pytest.raises(ShapeError, match=r"rank 9 was asked of an adapter of rank 8. Choose 1 to 8"):
        read_matryoshka(tmp_path / "m.safetensors", base_model("llama"), rank=9)


def test_loram_recovers_by_index(tmp_path: Path) -> None:
    """The authors' scatter with zeros, and their expansion of KV rows to query rows."""
    model = base_model("llama")
    channels = {i: torch.randperm(160, generator=torch.Generator().manual_seed(i))[:40] for i in (0, 1)}
    keys = torch.arange(24, 48)  # the second of two KV heads of 24
    for i in (0, 1):
        torch.save({"pruned_idx": channels[i]}, tmp_path / f"model.layers.{i}.mlp.gate_proj.pt")
        torch.save({"pruned_idx": keys}, tmp_path / f"model.layers.{i}.self_attn.k_proj.pt")
    queries = torch.arange(48, 96)  # two query heads per KV head
    generator = torch.Generator().manual_seed(9)
    full: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    deltas: dict[str, Delta] = {}
    for name, tensor in model.tensors.items():
        parts = name.split(".")
        if len(parts) != 4 or parts[2] not in ("wq", "wk", "wv", "wo", "gate", "up", "down"):
            continue
        n_out, n_in = tensor.shape
        i = int(parts[1])
        out = {"gate": channels[i], "up": channels[i], "wk": keys, "wv": keys, "wq": queries}.get(parts[2], torch.arange(0))
        into = {"down": channels[i], "wo": queries}.get(parts[2], torch.arange(0))
        rows = [r for r in range(n_out) if r not in out.tolist()]
        cols = [c for c in range(n_in) if c not in into.tolist()]
        a, b = torch.randn(4, len(cols), generator=generator) / 4, torch.randn(len(rows), 4, generator=generator) / 4
        deltas[name] = LoRA(a=a.numpy(), b=b.numpy())
        wide, tall = torch.zeros(4, n_in), torch.zeros(n_out, 4)
        wide[:, cols], tall[rows] = a, b
        full[name] = (wide, tall)
    from edgeq.deltas.adapter import Adapter

    pruned = Adapter(name="loram", kind="LORA", deltas=deltas)
    taken_out = read_pruned_indices(tmp_path, model)
    adapter = recovered(pruned, model, taken_out)
    for name, (wide, tall) in full.items():
        delta = adapter.deltas[name]
        assert isinstance(delta, LoRA)
        np.testing.assert_array_equal(delta.a, wide.numpy())
        np.testing.assert_array_equal(delta.b, tall.numpy())
    result = merged(model, [(adapter, 1.0)])
    assert difference(logits_of("llama", result), logits_of("llama", model)) > 0.01

    wrong = Adapter(name="loram", kind="LORA", deltas={"layers.0.gate.weight": LoRA(a=np.ones((4, 64)), b=np.ones((99, 4)))})
    with pytest.raises(
        ShapeError, match=r"layers\.0\.gate\.weight: the adapter fits a matrix of \[99, 64\], the index map leads from \[120, 64\]"
    ):
        recovered(wrong, model, taken_out)
    torch.save({"pruned_idx": torch.arange(5)}, tmp_path / "model.layers.0.self_attn.k_proj.pt")
    with pytest.raises(ShapeError, match="the rows taken out of k are not whole heads of 24"):
        recovered(pruned, model, read_pruned_indices(tmp_path, model))
    torch.save({"other": 1}, tmp_path / "model.layers.0.self_attn.k_proj.pt")
    with pytest.raises(SourceError, match="expected a list of numbers under 'pruned_idx'"):
        read_pruned_indices(tmp_path, model)
    (tmp_path / "model.layers.0.self_attn.k_proj.pt").write_bytes(b"no pickle")
    with pytest.raises(SourceError, match="weights-only loader refuses this file"):
        read_pruned_indices(tmp_path, model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="Name LoRAM's folder"):
        read_pruned_indices(tmp_path / "empty", model)


ENTRY = {"einsum": "or,r,ri->oi", "tensors": ["b", "z", {"seed": 7, "shape": [8, 64], "std": 0.3}], "scale": 0.5, "shape": [96, 64]}


def manifest(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(4)
    save_file({"b": torch.randn(96, 8, generator=generator), "z": torch.randn(8, generator=generator)}, folder / "delta.safetensors")
    content = {"format": 1, "name": "tera", "base": "someone/tiny", "deltas": {"layers.0.wq.weight": dict(ENTRY)}, **changes}
    (folder / "delta.json").write_text(json.dumps(content))
    return folder


def test_manifests(tmp_path: Path) -> None:
    folder = manifest(tmp_path / "a")
    adapter = open_adapter(folder, base_model("llama"))
    assert (adapter.name, adapter.kind, adapter.base_name) == ("tera", "MANIFEST", "someone/tiny")
    stored = load_file(folder / "delta.safetensors")
    seeded = torch.from_numpy(np.random.Generator(np.random.PCG64(7)).standard_normal((8, 64)) * 0.3)
    wanted = 0.5 * stored["b"].double() @ torch.diag(stored["z"].double()) @ seeded
    model = hf_base("llama")
    before = logits(model)
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.q_proj").weight.add_(wanted.float())
    assert difference(before, logits(model)) > 0.01
    assert difference(logits_of("llama", merged(base_model("llama"), [(adapter, 1.0)])), logits(model)) <= TOLERANCE


def entry(**changes: Any) -> dict[str, Any]:
    return {"deltas": {"layers.0.wq.weight": {k: v for k, v in {**ENTRY, **changes}.items() if v is not None}}}


BAD: dict[str, tuple[dict[str, Any], type[EdgeqError], str]] = {
    "format": ({"format": 2}, UnsupportedError, "format is 2, this edgeq reads 1"),
    "key": ({"extra": 1}, SourceError, "unknown key 'extra'"),
    "deltas": ({"deltas": []}, SourceError, "deltas must map canonical tensor names to objects"),
    "tensor": ({"deltas": {"wq": ENTRY}}, SourceError, "llama has no tensor 'wq'"),
    "entry key": (entry(exec="x"), SourceError, r"wq\.weight: unknown key 'exec'"),
    "einsum": (entry(einsum=3), SourceError, "expected an `einsum` string and a list of `tensors`"),
    "shape": (entry(shape=[96]), SourceError, r"shape is \[96\], expected \[n_out, n_in\]"),
    "scale": (entry(scale="x"), SourceError, "scale is 'x', expected a number"),
    "operand": (entry(tensors=["b", "z", "c"]), SourceError, "tensor 'c' is not in the file; it has b, z"),
    "seed": (entry(tensors=["b", "z", {"seed": -1, "shape": [8, 64], "std": 1.0}]), SourceError, "needs a seed from 0"),
    "operand kind": (entry(tensors=["b", "z", 5]), SourceError, "operand 5 is neither a tensor's name nor an object"),
    "huge": (entry(tensors=["b", "z", {"seed": 1, "shape": [99999, 99999], "std": 1.0}]), SourceError, "has more than 268435456 values"),
    "unused": (entry(tensors=["b", {"seed": 1, "shape": [8], "std": 1.0}, "b"]), UnsupportedError, "z is used by no entry"),
}


@pytest.mark.parametrize("fault", BAD)
def test_manifests_that_make_no_sense(fault: str, tmp_path: Path) -> None:
    changes, error, message = BAD[fault]
    with pytest.raises(error, match=message):
        read_manifest(manifest(tmp_path / "a", **changes), base_model("llama"))


def test_published_files_that_do_not_fit(tmp_path: Path) -> None:
    model, path = base_model("llama"), tmp_path / "a.safetensors"
    save_file({"model.layers.9.mlp.up_proj.parametrizations.weight.0.vector_z": torch.ones(4)}, path)
    with pytest.raises(SourceError, match=r"belongs to no module of llama\. Use the adapter's own base model"):
        read_loldu(path, model, alpha=1.0)
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(4)}, path)
    with pytest.raises(UnsupportedError, match="is no part of a LOLDU adapter"):
        read_loldu(path, model, alpha=1.0)
    save_file({"model.layers.0.mlp.up_proj.lora_A": torch.ones(64, 4)}, path)
    with pytest.raises(SourceError, match="lora_B is missing"):
        read_matryoshka(path, model)
    save_file({"model.layers.0.mlp.up_proj.lora_A": torch.ones(64, 4), "model.layers.0.mlp.up_proj.lora_B": torch.ones(4, 99)}, path)
    with pytest.raises(ShapeError, match=r"make \[99, 64\], the module here is \[160, 64\]"):
        read_matryoshka(path, model)
    save_file({}, path)
    with pytest.raises(SourceError, match="the adapter has no tensors"):
        read_matryoshka(path, model)


def test_paths_and_names(tmp_path: Path) -> None:
    folder = lora_folder("llama", tmp_path / "sql=v2")
    assert split_reference(str(folder)) == (folder, None)
    assert split_reference(f"{folder}=style") == (folder, "style")
    assert split_reference("some/where") == (Path("some/where"), None)
    for bad in ("", "a/b", ".x"):
        with pytest.raises(UsageError, match="must consist of letters, digits"):
            split_reference(f"{tmp_path}/x={bad}")
    assert open_adapter(folder, base_model("llama"), name="style").name == "style"
    with pytest.raises(SourceError, match=r"does not exist\. Name an adapter's folder"):
        open_adapter(tmp_path / "none", base_model("llama"))
    with pytest.raises(SourceError, match=r"is no adapter: expected a folder with adapter_config\.json or delta\.json"):
        open_adapter(tmp_path, base_model("llama"))
    (tmp_path / "a.gguf").write_bytes(b"x")
    with pytest.raises(UsageError, match="a rank can be chosen of PEFT, DyLoRA and MatryoshkaLoRA adapters only"):
        open_adapter(tmp_path / "a.gguf", base_model("llama"), rank=2)
    assert adapter_tokenizer(open_adapter(folder, base_model("llama"))) is None


def test_the_tokenizer_of_added_tokens_comes_from_the_adapters_folder(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from tiny import write_tokenizer

    base = hf_base("llama")
    base.resize_token_embeddings(328, mean_resizing=False)
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "a", save_embedding_layers=True)
    adapter = open_adapter(tmp_path / "a", base_model("llama"))
    assert adapter_tokenizer(adapter) is None
    write_tokenizer(tmp_path / "a")
    tokenizer = adapter_tokenizer(adapter)
    assert tokenizer is not None and len(tokenizer.vocabulary.tokens) == 328


def test_bone_is_miss_under_its_old_name(tmp_path: Path) -> None:
    from peft import MissConfig

    case = make("llama", MissConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM"), tmp_path / "a")
    weights = load_file(case.folder / "adapter_model.safetensors")
    save_file({key.replace("miss_block", "bone_block"): value for key, value in weights.items()}, case.folder / "adapter_model.safetensors")
    edit_json(case.folder / "adapter_config.json", lambda c: (c.update(peft_type="BONE"), c.pop("miss_dropout"), c.pop("mini_r")))
    assert case.merged is not None and difference(case.base, case.merged) > 0.01
    model = base_model("llama")
    assert difference(logits_of("llama", merged(model, [(read_peft_folder(case.folder, model), 1.0)])), case.merged) <= TOLERANCE


def test_butterflies_of_several_factors(tmp_path: Path) -> None:
    """PEFT needs CUDA for more than one factor, so its own permutation and Cayley code is put together here."""
    from peft import BOFTConfig
    from peft.tuners.boft.layer import BOFTLayer

    case = make("llama", BOFTConfig(task_type="CAUSAL_LM", boft_block_size=8, target_modules=["q_proj"]), tmp_path / "a")
    generator = torch.Generator().manual_seed(5)
    weights = load_file(case.folder / "adapter_model.safetensors")
    weights = {k: torch.randn(3, 8, 8, 8, generator=generator) * 0.2 if k.endswith("boft_R") else v for k, v in weights.items()}
    save_file(weights, case.folder / "adapter_model.safetensors")
    edit_json(case.folder / "adapter_config.json", lambda c: c.update(boft_n_butterfly_factor=3))

    def rotated(weight: torch.Tensor, blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        turn = torch.eye(64)
        for i in range(3):
            order = BOFTLayer.block_butterfly_perm(None, 64, 8 // 2**i, 4, 2)  # type: ignore[arg-type]
            place = BOFTLayer.perm2mat(None, order)  # type: ignore[arg-type]
            turn = place @ torch.block_diag(*BOFTLayer.cayley_batch(None, blocks[i])) @ place.T @ turn  # type: ignore[arg-type]
        return (turn @ weight.T).T * scale

    model = hf_base("llama")
    before = logits(model)
    with torch.no_grad():
        for i in (0, 1):
            key = f"base_model.model.model.layers.{i}.self_attn.q_proj"
            linear = model.get_submodule(f"model.layers.{i}.self_attn.q_proj")
            linear.weight.copy_(rotated(linear.weight, weights[f"{key}.boft_R"], weights[f"{key}.boft_s"]))
    assert difference(before, logits(model)) > 0.01
    base = base_model("llama")
    assert difference(logits_of("llama", merged(base, [(read_peft_folder(case.folder, base), 1.0)])), logits(model)) <= TOLERANCE
