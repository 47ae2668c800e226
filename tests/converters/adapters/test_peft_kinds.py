"""Every kind that PEFT has, merged by edgeq, against PEFT's own merge_and_unload. The oracle of numbers here is PEFT itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft_oracle import TOLERANCE, base_model, difference, logits_of, make

from edgeq.converters.adapters.peft import read_peft_folder
from edgeq.deltas.merge import merged

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]

# (config class, options); target_modules follow from the family. Sizes divide 64, 96, 48 and 160 where a kind needs that.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 4, "lora_alpha": 12}),
    "rslora": ("LoraConfig", {"r": 9, "lora_alpha": 12, "use_rslora": True}),
    "patterns": ("LoraConfig", {"r": 4, "rank_pattern": {"o_proj": 7}, "alpha_pattern": {r"layers\.1\..*down_proj": 3, "o_proj": 21}}),
    "high-rank": ("LoraConfig", {"r": 100, "lora_alpha": 50}),
    "dora": ("LoraConfig", {"r": 4, "lora_alpha": 12, "use_dora": True}),
    "kasa": ("LoraConfig", {"r": 4, "kasa_config": "KasaConfig"}),
    "orthogonal": ("LoraConfig", {"r": 4, "init_lora_weights": "orthogonal"}),
    "mica": ("LoraConfig", {"r": 4, "init_lora_weights": "mica"}),
    "adalora": ("AdaLoraConfig", {"init_r": 6, "target_r": 4, "total_step": 10, "lora_alpha": 8}),
    "loha": ("LoHaConfig", {"r": 3, "alpha": 9, "init_weights": False}),
    "lokr": ("LoKrConfig", {"r": 3, "alpha": 9, "init_weights": False}),
    "lokr-both": ("LoKrConfig", {"r": 1, "alpha": 2, "decompose_both": True, "init_weights": False}),
    "ia3": ("IA3Config", {}),
    "vera": ("VeraConfig", {"r": 8}),
    "vera-seed": ("VeraConfig", {"r": 8, "save_projection": False, "projection_prng_key": 11}),
    "oft": ("OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False}),
    "oft-neumann": ("OFTConfig", {"oft_block_size": 16, "use_cayley_neumann": True}),
    "oft-share": ("OFTConfig", {"r": 4, "oft_block_size": 0, "block_share": True}),
    "oft-coft": ("OFTConfig", {"oft_block_size": 8, "coft": True, "eps": 0.5}),
    "boft": ("BOFTConfig", {"boft_block_size": 8}),
    "hra": ("HRAConfig", {"r": 4, "init_weights": False}),
    "hra-gs": ("HRAConfig", {"r": 4, "apply_GS": True, "init_weights": False}),
    "shira": ("ShiraConfig", {"r": 2}),
    "randlora": ("RandLoraConfig", {"r": 16, "randlora_alpha": 8}),
    "randlora-seed": ("RandLoraConfig", {"r": 16, "randlora_alpha": 8, "save_projection": False, "projection_prng_key": 5}),
    "randlora-sparse": (
        "RandLoraConfig",
        {"r": 16, "randlora_alpha": 8, "sparse": True, "save_projection": False, "projection_prng_key": 5},
    ),
    "randlora-very-sparse": ("RandLoraConfig", {"r": 16, "very_sparse": True, "save_projection": False, "projection_prng_key": 5}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 200, "scaling": 150.0}),
    "waveft": ("WaveFTConfig", {"n_frequency": 200, "scaling": 5.0}),
    "waveft-db4": ("WaveFTConfig", {"n_frequency": 200, "scaling": 5.0, "wavelet_family": "db4", "random_loc_seed": 3}),
    "waveft-direct": ("WaveFTConfig", {"n_frequency": 200, "scaling": 5.0, "use_idwt": False}),
    "hira": ("HiraConfig", {"r": 8}),
    "miss": ("MissConfig", {"r": 8}),
    "miss-ragged": ("MissConfig", {"r": 7}),
    "miss-mini": ("MissConfig", {"r": 8, "mini_r": 4, "init_weights": "mini"}),
    "miss-bat": ("MissConfig", {"r": 8, "init_weights": "bat"}),
    "c3a": ("C3AConfig", {"block_size": 8}),
    "delora": ("DeloraConfig", {"r": 4, "delora_lambda": 5}),
    "tinylora": ("TinyLoraConfig", {"r": 3, "u": 7}),
    "tinylora-tied": ("TinyLoraConfig", {"r": 3, "u": 7, "weight_tying": 0.6, "save_projection": False, "projection_seed": 4}),
    "gralora": ("GraloraConfig", {"r": 8, "gralora_k": 2, "alpha": 16}),
    "gralora-hybrid": ("GraloraConfig", {"r": 8, "gralora_k": 4, "hybrid_r": 4, "alpha": 16}),
    "road-1": ("RoadConfig", {"variant": "road_1", "group_size": 8}),
    "road-2": ("RoadConfig", {"variant": "road_2", "group_size": 8}),
    "road-4": ("RoadConfig", {"variant": "road_4", "group_size": 8}),
}
FAMILIES = {"llama": ALL, "qwen2": ALL, "phi3": FUSED}


def config_of(kind: str, family: str) -> Any:
    import peft

    name, options = KINDS[kind]
    options = {**options, "target_modules": FAMILIES[family]}
    if kind == "ia3":
        options["feedforward_modules"] = ["down_proj"]
    if kind == "kasa":
        options["kasa_config"] = peft.KasaConfig()
    return getattr(peft, name)(task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_merging_equals_pefts_merge(kind: str, family: str, tmp_path: Path) -> None:
    case = make(family, config_of(kind, family), tmp_path / "adapter")
    assert case.merged is not None
    assert difference(case.merged, case.base) > 0.01, "the adapter changes too little to test anything"

    model = base_model(family)
    result = merged(model, [(read_peft_folder(case.folder, model), 1.0)])

    assert difference(logits_of(family, result), case.merged) <= TOLERANCE
