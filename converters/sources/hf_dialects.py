"""How each `model_type` writes its config.json, as rows, and what every other key may be.

A family (`edgeq.families`) says what a model computes; a dialect says how Hugging Face spells that: which keys exist, what an
absent key means, which layers look through a window. Defaults are those of the transformers configuration classes. Only a nested
`text_config` leaves out sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from edgeq.converters.sources.hf_rope import ROPE_KINDS

# Which layers look back through `sliding_window` tokens only:
#   none   no layer; a window is refused
#   all    every layer (Mistral 7B v0.1, Phi-3 mini)
#   upper  with use_sliding_window: layers from max_window_layers on, or as layer_types says (Qwen)
#   nope   with use_sliding_window: layers without rotary embedding, or as layer_types says (SmolLM3)
#   local  as layer_types or sliding_window_pattern says; those layers have a rotary base of their own (Gemma 3)
WindowRule = Literal["none", "all", "upper", "nope", "local"]


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One model_type.

    architecture: the class in `architectures` that goes with it. states_biases: the bias keys of the family's row are read.
    partial_rotary: `partial_rotary_factor` is read. skips_rope: `no_rope_layers` is read.
    states_attn_scalar: queries are scaled by `query_pre_attn_scalar` to the power -1/2. rope_kinds: rope types its code knows.
    defaults: what an absent key means; sizes without one must be there.
    """

    model_type: str
    architecture: str
    window: WindowRule = "none"
    states_biases: bool = True
    partial_rotary: bool = False
    skips_rope: bool = False
    states_attn_scalar: bool = False
    rope_kinds: tuple[str, ...] = ROPE_KINDS
    defaults: Mapping[str, Any] = field(default_factory=dict)


DIALECTS = (
    Dialect(model_type="llama", architecture="LlamaForCausalLM"),
    Dialect(model_type="mistral", architecture="MistralForCausalLM", window="all", states_biases=False, defaults={"sliding_window": 4096}),
    Dialect(
        model_type="qwen2", architecture="Qwen2ForCausalLM", window="upper", defaults={"sliding_window": 4096, "max_window_layers": 28}
    ),
    Dialect(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        window="upper",
        defaults={"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    ),
    Dialect(
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        window="all",
        partial_rotary=True,
        rope_kinds=("default", "longrope"),
        defaults={"original_max_position_embeddings": 4096},
    ),
    Dialect(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        window="local",
        states_attn_scalar=True,
        defaults={
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        },
    ),
    Dialect(
        model_type="smollm3",
        architecture="SmolLM3ForCausalLM",
        window="nope",
        skips_rope=True,
        defaults={"rope_theta": 2000000.0, "no_rope_layer_interval": 4, "tie_word_embeddings": True},
    ),
)


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """A multimodal checkpoint whose text model is one of ours: where its config and tensors lie, and what is left behind.

    renamed: prefix of stored tensor names -> prefix in a text-only checkpoint; the first that fits. left_out: prefixes of the rest.
    """

    architecture: str
    section: str
    model_type: str
    renamed: Mapping[str, str]
    left_out: tuple[str, ...]


WRAPPERS = (
    # Gemma 3 from 4B up: https://huggingface.co/docs/transformers/model_doc/gemma3. transformers 4.52 moved `model` to the front.
    Wrapper(
        architecture="Gemma3ForConditionalGeneration",
        section="text_config",
        model_type="gemma3_text",
        renamed={"language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "model.language_model.": "model."},
        left_out=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    ),
)

# Keys that must have one of these values, unless the dialect reads them: our code was written for no other.
ONLY: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_bias": (False,),
    "attn_logit_softcapping": (),
    "cross_attention_hidden_size": (),
    "final_logit_softcapping": (),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "is_llama_config": (True,),
    "lm_head_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "pruned_heads": ({},),
    "qk_layernorm": (False,),
    "rope_interleaved": (False,),
    "sliding_window": (),
    "tie_encoder_decoder": (False,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}

# Quantized checkpoints say so under one of these.
QUANTIZATION = ("quantization_config", "compression_config", "quantization")

# Keys that change nothing a forward pass computes: training, generation, ids, bookkeeping. pretraining_tp (2 in SmolLM3-3B) only
# ever sliced a product into a sum of equal value; transformers no longer looks at it.
# fmt: off
HARMLESS = frozenset({
    "architectures", "attention_dropout", "attention_probs_dropout_prob", "auto_map", "bad_words_ids", "begin_suppress_tokens", "bf16",
    "boi_token_index", "bos_token_id", "cache_implementation", "chunk_size_feed_forward", "custom_pipelines", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dtype", "early_stopping", "embd_pdrop", "encoder_no_repeat_ngram_size", "eoi_token_index",
    "eos_token_id", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "fp16",
    "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob", "id2label", "image_token_index", "initializer_range", "is_decoder",
    "keys_to_ignore_at_inference", "label2id", "length_penalty", "max_length", "max_sequence_length", "max_window_layers", "min_length",
    "mm_tokens_per_image", "model_type", "name_or_path", "neftune_noise_alpha", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_labels", "num_return_sequences", "original_max_position_embeddings", "output_attentions", "output_hidden_states",
    "output_scores", "pad_token", "pad_token_id", "prefix", "pretraining_tp", "problem_type", "remove_invalid_values",
    "repetition_penalty", "resid_pdrop", "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_last_hidden_states", "tokenizer_class", "top_k", "top_p", "torch_dtype",
    "torchscript", "typical_p", "unk_token_id", "use_bfloat16", "use_cache",
})
# fmt: on
HARMLESS_PREFIXES = ("_", "transformers", "unsloth")
