"""Which adapters can be kept: PEFT's own kinds, exactly or nearly, against what the adapter does to a weight; the rest refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_adapters import TOLERANCE, difference, made_adapter, run, write_base
from peft_oracle import base_model, make

from edgeq.converters.adapters.describe import AdapterReport, describe
from edgeq.converters.adapters.gguf_writer import write_lora
from edgeq.converters.adapters.keep import change_of, kept_factors, lora_factors
from edgeq.converters.adapters.peft import read_peft_folder
from edgeq.converters.gguf.lowering import lower
from edgeq.deltas.adapter import Adapter
from edgeq.deltas.delta import Change, Delta, Part, Replace, SetRows, Then
from edgeq.deltas.lora import DoRA, LoRA
from edgeq.deltas.merge import merged
from edgeq.errors import PlanError, SourceError, UnsupportedError
from edgeq.grids import F32

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What PEFT's own conversion to LoRA or the algebra says is of low rank, and what is not.
EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "rslora": ("LoraConfig", {"r": 9, "lora_alpha": 12, "use_rslora": True, "rank_pattern": {"o_proj": 3}}),
    "vera": ("VeraConfig", {"r": 8}),
    "delora": ("DeloraConfig", {"r": 4, "delora_lambda": 5}),
    "loha": ("LoHaConfig", {"r": 3, "alpha": 9, "init_weights": False}),
    "hra": ("HRAConfig", {"r": 4, "init_weights": False}),
    "miss": ("MissConfig", {"r": 8}),
    "tinylora": ("TinyLoraConfig", {"r": 3, "u": 7}),
}
FULL: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("LoraConfig", {"r": 4, "lora_alpha": 12, "use_dora": True}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "oft": ("OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False}),
    "shira": ("ShiraConfig", {"r": 2}),
    "randlora": ("RandLoraConfig", {"r": 16, "randlora_alpha": 8}),
}


def peft_adapter(kinds: dict[str, tuple[str, dict[str, Any]]], kind: str, folder: Path) -> Adapter:
    import peft

    name, options = kinds[kind]
    make("llama", getattr(peft, name)(task_type="CAUSAL_LM", target_modules=ALL, **options), folder, merge=False)
    return read_peft_folder(folder, base_model("llama"), name=kind)


@pytest.mark.parametrize("kind", EXACT)
def test_kinds_of_low_rank_are_kept_exactly(kind: str, tmp_path: Path) -> None:
    model = base_model("llama")
    adapter = peft_adapter(EXACT, kind, tmp_path / kind)
    kept = kept_factors(adapter, model)
    assert kept.factors.keys() == adapter.deltas.keys()
    assert not kept.lost
    for name, factors in kept.factors.items():
        change = change_of(name, adapter.deltas[name], model)
        assert np.abs(change).max() > 1e-4
        np.testing.assert_allclose(factors.product(), change, atol=1e-9)
        assert factors.rank < min(change.shape)
    report = describe(adapter, model)
    assert report.verdict("keep").how == report.verdict("merge").how == report.verdict("squeeze").how == "exact"
    assert [t.rank for t in report.targets] == [factors.rank for factors in kept.factors.values()]


@pytest.mark.parametrize("kind", FULL)
def test_kinds_of_full_rank_are_refused_or_approximated(kind: str, tmp_path: Path) -> None:
    model = base_model("llama")
    adapter = peft_adapter(FULL, kind, tmp_path / kind)
    label = adapter.kind
    with pytest.raises(
        UnsupportedError, match=rf"'{kind}' cannot be kept as it is: {label} changes layers\.0\.wq\.weight in full rank\. Merge"
    ):
        kept_factors(adapter, model)
    report = describe(adapter, model)
    assert report.verdict("keep").how == "approximate"
    assert report.verdict("keep").reason == f"layers.0.wq.weight: {label} changes it in full rank"
    assert report.verdict("merge").how == "exact"
    near, far = kept_factors(adapter, model, energy=0.99), kept_factors(adapter, model, rank=3)
    for name, delta in adapter.deltas.items():
        change = change_of(name, delta, model)
        for kept in (near, far):
            true = float(np.sum((change - kept.factors[name].product()) ** 2) / np.sum(change**2))
            assert kept.lost[name] == pytest.approx(true, rel=1e-6, abs=1e-12)
        assert near.lost[name] <= 0.01
        assert far.factors[name].rank == 3
    moments = {"layers.0.down": np.where(np.arange(160) < 20, 50.0, 0.1)}
    name = "layers.0.down.weight"
    aware, plain = kept_factors(adapter, model, rank=3, moments=moments).factors[name], far.factors[name]
    change = change_of(name, adapter.deltas[name], model)

    def error(product: np.ndarray) -> float:
        return float(np.sum((change - product) ** 2 * moments["layers.0.down"]))

    assert error(aware.product()) < error(plain.product())


def test_an_approximation_that_loses_nothing_is_the_merged_model(tmp_path: Path) -> None:
    """DoRA in llama.cpp, of full rank, as factors that keep all of its energy."""
    model = base_model("llama")
    adapter = peft_adapter(FULL, "dora", tmp_path / "dora")
    low = lower(model)
    base = write_base(tmp_path / "base.gguf", low)
    files: dict[str, tuple[Path, Path | None]] = {"base": (base, None)}
    files["merged"] = (write_base(tmp_path / "merged.gguf", lower(merged(model, [(adapter, 1.0)]))), None)
    for energy in (1.0, 0.9):
        path = tmp_path / f"{energy}.gguf"
        write_lora(path, kept_factors(adapter, model, energy=energy), low, grid=F32)
        files[str(energy)] = (base, path)
    found = run(files)
    assert difference(found["base"], found["merged"]) > 0.1
    assert difference(found["1.0"], found["merged"]) < TOLERANCE
    assert TOLERANCE < difference(found["0.9"], found["merged"]) < difference(found["base"], found["merged"])


def made(deltas: dict[str, Delta], kind: str = "LORA") -> Adapter:
    return Adapter(name="mine", kind=kind, deltas=deltas, base_name="tiny/model", notes=("a note",))


def lora(n_out: int, n_in: int) -> LoRA:
    rng = np.random.default_rng(0)
    return LoRA(a=rng.standard_normal((2, n_in)), b=rng.standard_normal((n_out, 2)))


REFUSED: dict[str, tuple[str, str, Delta, str]] = {
    "bias": ("qwen2", "layers.0.wq.bias", Change(np.ones(96)), r"a LoRA file has no place for biases"),
    "norm": ("llama", "final_norm.weight", Replace(np.ones(64), (64,)), r"a LoRA file has no place for norms"),
    "tokens added": ("llama", "embed.weight", Replace(np.ones((330, 64)), (320, 64)), r"a LoRA file cannot add tokens \(320 to 330\)"),
    "saved module": ("llama", "layers.0.up.weight", Replace(np.ones((160, 64)), (160, 64)), r"it is saved whole with the adapter"),
    "saved below a LoRA": (
        "llama",
        "layers.0.up.weight",
        Then(Replace(np.ones((160, 64)), (160, 64)), lora(160, 64)),
        r"it is saved whole with the adapter, which is no change of low rank",
    ),
    "trained tokens": ("llama", "embed.weight", SetRows(np.array([3]), np.ones((1, 64)), (320, 64)), r"it has trained tokens, whole rows"),
    "tied embedding": ("qwen2-tied", "embed.weight", lora(320, 96), r"embedding and head are one tensor here, and llama\.cpp would"),
    "tied head": ("qwen2-tied", "head.weight", lora(320, 96), r"embedding and head are one tensor here"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_lora_file_has_no_place_for_is_refused_by_name(case: str) -> None:
    family, name, delta, reason = REFUSED[case]
    adapter = made({"layers.1.wo.weight": lora(96 if family != "llama" else 64, 96), name: delta})
    pattern = (
        rf"adapter 'mine' cannot be kept: {name.replace('.', chr(92) + '.')} cannot go into a LoRA file: {reason}.*\. Merge the adapter"
    )
    for options in ({}, {"rank": 4}):
        with pytest.raises(UnsupportedError, match=pattern):
            kept_factors(adapter, base_model(family), **options)
    report = describe(adapter, base_model(family))
    assert report.verdict("keep").how == "refused"
    assert report.verdict("keep").reason.startswith(f"{name}: ")
    assert report.verdict("merge").how == "exact"


def test_peft_may_adapt_a_shared_embedding_and_its_head_apart() -> None:
    delta = lora(320, 96)
    found = lora_factors(made({"head.weight": delta}), base_model("qwen2-tied"))
    np.testing.assert_allclose(found.factors["head.weight"].product(), delta.change(), atol=1e-12)


def test_several_refusals_are_counted() -> None:
    adapter = made({f"layers.{i}.wq.bias": Change(np.ones(96)) for i in range(2)})
    with pytest.raises(UnsupportedError, match=r"layers\.0\.wq\.bias cannot go into a LoRA file, nor 1 more such tensors: a LoRA file"):
        kept_factors(adapter, base_model("qwen2"))


def test_an_adapter_of_another_model_is_refused_and_described() -> None:
    model = base_model("llama")
    adapter = made({"layers.0.wq.weight": lora(96, 65), "layers.9.wq.weight": lora(96, 64)})
    with pytest.raises(SourceError, match=r"does not fit .*: layers\.0\.wq\.weight is \[96, 64\] there"):
        kept_factors(adapter, model)
    report = describe(adapter, model)
    assert report.mismatch is not None and "layers.0.wq.weight is [96, 64] there" in report.mismatch
    reasons = [target.merge.reason for target in report.targets]
    assert reasons == [f"{model.name} has it as [96, 64], the adapter was made for [96, 65]", f"{model.name} has no such tensor"]
    assert report.verdict("merge").how == report.verdict("keep").how == "refused"


def test_requests_that_make_no_sense_are_refused() -> None:
    model = base_model("llama")
    for options in ({"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 2.0}):
        with pytest.raises(PlanError):
            kept_factors(made_adapter(model), model, **options)  # type: ignore[arg-type]


def test_a_part_of_a_fused_projection_follows_from_the_whole() -> None:
    """Kinds that cannot be cut by rows see the whole fused matrix."""
    model = base_model("phi3")
    whole = np.concatenate([model.tensors[f"layers.0.{role}.weight"].decode() for role in ("wq", "wk", "wv")]).astype(np.float64)
    names = tuple(f"layers.0.{role}.weight" for role in ("wq", "wk", "wv"))
    rng = np.random.default_rng(0)
    dora = DoRA(lora=lora(len(whole), 96), magnitude=rng.random(96) + 0.5, axis=0)
    part = Part(dora, 96, 144, names)
    np.testing.assert_allclose(change_of(names[1], part, model), (dora.apply(whole) - whole)[96:144], atol=1e-12)


def test_a_report_has_what_an_inspection_prints() -> None:
    model = base_model("llama")
    adapter = made_adapter(model, (2, 5), outer=True)
    report = describe(adapter, model)
    assert isinstance(report, AdapterReport)
    assert (report.name, report.kind, report.base_name, report.mismatch) == ("made", "LORA", "tiny/model", None)
    assert report.ranks == {2: 8, 5: 8}
    assert list(report.roles)[:4] == ["embed.weight", "wq.weight", "wk.weight", "wv.weight"]
    assert [target.name for target in report.roles["down.weight"]] == ["layers.0.down.weight", "layers.1.down.weight"]
    document = report.to_json()
    assert document["keep"] == {"how": "exact", "reason": None}
    assert document["ranks"] == {"2": 8, "5": 8}
    first = document["targets"][0]
    assert (first["name"], first["shape"], first["rank"], first["keep"]["how"]) == ("embed.weight", [320, 64], 2, "exact")
    tied = describe(made({"head.weight": lora(320, 96)}), base_model("qwen2-tied")).to_json()
    assert (tied["keep"]["how"], tied["squeeze"]["how"], tied["targets"][0]["rank"]) == ("refused", "exact", 2)
    assert tied["notes"] == ["a note"]
