"""PEFT's kinds of adapters, one row each: how a module is built, and which config keys matter to training alone.

A key that is neither read, nor in these rows, is refused by name. Kinds that no weight can express are refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgeq.converters.adapters import kinds_lora as lora
from edgeq.converters.adapters import kinds_other as other
from edgeq.converters.adapters.kinds_lora import Deltas
from edgeq.converters.adapters.module import Module
from edgeq.converters.sources.json_file import Section


@dataclass(frozen=True, kw_only=True)
class Kind:
    """training: config keys that shape training, or what PEFT builds before it loads the file, but not what the file then means.

    Of fan_in_fan_out: it concerns transposed layers (GPT-2's Conv1D); PEFT turns it off for all layers that our families have.
    """

    build: Callable[[Module], Deltas]
    training: frozenset[str] = frozenset()
    modules: tuple[str, ...] = ("linear",)
    check: Callable[[Section], None] | None = None


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


ALWAYS = _keys(
    "peft_type task_type inference_mode auto_mapping peft_version revision base_model_name_or_path "
    "target_modules exclude_modules layers_to_transform layers_pattern modules_to_save bias trainable_token_indices fan_in_fan_out"
)
_DROPOUTS = _keys("rank_dropout module_dropout rank_dropout_scale")

KINDS = {
    "LORA": Kind(
        build=lora.build_lora,
        check=lora.check_lora,
        modules=("linear", "embedding"),
        training=_keys(
            "lora_dropout init_lora_weights loftq_config eva_config corda_config lora_ga_config runtime_config megatron_core "
            "velora_config monteclora_config qalora_group_size ensure_weight_tying"
        ),
    ),
    "ADALORA": Kind(
        build=lora.build_adalora,
        check=lora.check_lora,
        training=_keys(
            "r target_r init_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step lora_dropout init_lora_weights loftq_config "
            "eva_config corda_config lora_ga_config runtime_config megatron_core velora_config monteclora_config qalora_group_size "
            "ensure_weight_tying alpha_pattern use_rslora"
        ),
    ),
    "LOHA": Kind(build=other.build_loha, training=_keys("init_weights use_effective_conv2d") | _DROPOUTS),
    "LOKR": Kind(build=other.build_lokr, training=_keys("init_weights use_effective_conv2d decompose_both decompose_factor") | _DROPOUTS),
    "IA3": Kind(build=other.build_ia3, training=_keys("init_ia3_weights")),
    "VERA": Kind(build=lora.build_vera, training=_keys("vera_dropout d_initial init_weights save_projection projection_prng_key")),
    "OFT": Kind(
        build=other.build_oft,
        training=_keys("module_dropout init_weights num_cayley_neumann_terms eps"),
    ),
    "BOFT": Kind(build=other.build_boft, training=_keys("boft_dropout init_weights")),
    "HRA": Kind(build=other.build_hra, training=_keys("init_weights")),
    "SHIRA": Kind(build=other.build_shira, training=_keys("mask_type random_seed init_weights")),
    "RANDLORA": Kind(
        build=lora.build_randlora,
        training=_keys("randlora_dropout init_weights save_projection projection_prng_key sparse very_sparse"),
    ),
    "FOURIERFT": Kind(build=other.build_fourier, training=_keys("init_weights")),
    "WAVEFT": Kind(build=other.build_wave, training=_keys("init_weights wavelet_family n_frequency n_frequency_pattern")),
    "HIRA": Kind(build=lora.build_hira, modules=("linear", "embedding"), training=_keys("hira_dropout init_weights")),
    "MISS": Kind(build=lora.build_miss, training=_keys("miss_dropout mini_r init_weights")),
    "BONE": Kind(build=lora.build_miss, training=_keys("init_weights")),
    "C3A": Kind(build=other.build_c3a, training=_keys("init_weights")),
    "DELORA": Kind(build=lora.build_delora, training=_keys("module_dropout init_weights delora_lambda lambda_pattern")),
    "TINYLORA": Kind(
        build=lora.build_tinylora,
        training=_keys("r save_projection projection_seed init_v_bound tinylora_dropout init_weights"),
    ),
    "GRALORA": Kind(build=lora.build_gralora, training=_keys("gralora_dropout init_weights")),
    "ROAD": Kind(build=other.build_road, training=_keys("init_weights")),
    "LN_TUNING": Kind(build=other.build_norms, modules=("norm",)),
    "QHFT": Kind(build=other.build_qwha, training=_keys("n_frequency scaling random_loc_seed init_weights n_frequency_pattern")),
}

_PROMPTS = "it puts trained vectors before the prompt and changes no weight; neither merging nor a LoRA file can carry it"
_INPUT = "what it does depends on the input, so there is no weight to merge it into"
REFUSED = {
    "PROMPT_TUNING": _PROMPTS,
    "MULTITASK_PROMPT_TUNING": _PROMPTS,
    "P_TUNING": _PROMPTS,
    "PREFIX_TUNING": _PROMPTS,
    "CPT": _PROMPTS,
    "CARTRIDGE": _PROMPTS,
    "ADAPTION_PROMPT": _PROMPTS,
    "XLORA": _INPUT,
    "POLY": _INPUT,
    "SHADOW": "it is a network beside the model, so there is no weight to merge it into",
}
