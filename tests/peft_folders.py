"""LoRA adapters as PEFT saves them, written by hand, with the change that each makes to every weight in float64."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

Changes = dict[str, npt.NDArray[np.float64]]

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")


def lora_folder(
    folder: Path,
    model: Path,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    targets: Sequence[str] = LINEARS,
    seed: int = 0,
    gain: float = 0.1,
    base_name: str | None = "someone/tiny",
) -> Changes:
    """A LoRA on the model's modules of these names; the change of each weight by its name in the checkpoint."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    changes: Changes = {}
    modules = set()
    for name, (n_out, n_in) in _shapes(model).items():
        module = name.removesuffix(".weight")
        if module.split(".")[-1] not in targets:
            continue
        modules.add(module.split(".")[-1])
        a = (rng.standard_normal((rank, n_in)) / np.sqrt(n_in)).astype(np.float32)
        b = (rng.standard_normal((n_out, rank)) * gain).astype(np.float32)
        tensors[f"base_model.model.{module}.lora_A.weight"], tensors[f"base_model.model.{module}.lora_B.weight"] = a, b
        changes[name] = alpha / rank * (b.astype(np.float64) @ a.astype(np.float64))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(modules),
        "base_model_name_or_path": base_name,
    }
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return changes


def _shapes(model: Path) -> dict[str, tuple[int, int]]:
    """Matrices of a float checkpoint in one file."""
    state = load_file(model / "model.safetensors")
    return {name: (values.shape[0], values.shape[1]) for name, values in state.items() if values.ndim == 2}
