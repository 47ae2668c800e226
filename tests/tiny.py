"""Tiny random models in Hugging Face layout, and the transformers model that reads them: the oracle of many tests.

Sizes differ from each other wherever the architecture lets them, so that a swapped axis fails. Every weight is random, norms and
biases too (transformers would start them at one and zero), and scaled so that logits are of order 1. Same name and seed, same bytes.

    folder = hf_folder(tmp_path / "m", "qwen3", dtype="bfloat16", shards=3)
    logits = hf_model(folder)(ids).logits
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedModel

N_VOCAB = 320
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRAINING_TEXT = (
    "The quick brown fox jumps over the lazy dog, and the other dogs think that this is the best thing there is. "
    "In the end there are 1234567890 ways to count; here, there and then the weather is warm. "
    "def main(args): return sum(x * 2 for x in range(10))  # the loop\n"
    "Größe, naïve café, привет мир, 你好世界, こんにちは, 😀👍🏽 "
)

_COMMON = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
_HEAD_24: dict[str, Any] = {**_COMMON, "head_dim": 24}
# Qwen2 and Phi-3 have no head_dim of their own: n_embd / n_heads = 96 / 4 = 24.
_SQUARE: dict[str, Any] = {**_COMMON, "hidden_size": 96}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# 3 of 4 dimensions rotate: 18 of 24, 9 pairs. The long factors apply beyond 64 tokens.
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.05 * i for i in range(9)],
    "long_factor": [1.0 + 0.5 * i for i in range(9)],
}
_GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
}

# name -> (transformers model class, its config class, config values)
_ROWS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_HEAD_24, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "llama3": ("LlamaForCausalLM", "LlamaConfig", {**_HEAD_24, "rope_parameters": _LLAMA3_ROPE}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_HEAD_24, "sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _SQUARE),
    "qwen2-tied": ("Qwen2ForCausalLM", "Qwen2Config", {**_SQUARE, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _HEAD_24),
    "phi3": (
        "Phi3ForCausalLM",
        "Phi3Config",
        {**_SQUARE, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "phi3-longrope": ("Phi3ForCausalLM", "Phi3Config", {**_SQUARE, "original_max_position_embeddings": 64, "rope_parameters": _LONGROPE}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **_HEAD_24,
            "num_hidden_layers": 3,
            "tie_word_embeddings": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 24,
            "rope_parameters": _GEMMA3_ROPE,
        },
    ),
    # Layer 3 (the fourth) does not rotate. SmolLM3 has no head_dim of its own either.
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {**_SQUARE, "num_hidden_layers": 4, "tie_word_embeddings": True}),
}
TINY_FAMILIES: tuple[str, ...] = tuple(_ROWS)


def tiny_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE of N_VOCAB tokens, laid out as SmolLM2's: three specials, 256 bytes, then merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)
    assert tokenizer.get_vocab_size() == N_VOCAB
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json (with a ChatML template) into `folder`."""
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    added = {
        str(i): {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        for i, token in enumerate(SPECIAL_TOKENS)
    }
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": "<|im_start|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 256,
        "pad_token": "<|im_end|>",
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": "<|endoftext|>",
        "vocab_size": N_VOCAB,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def random_model(name: str, *, seed: int = 0, **config_overrides: Any) -> PreTrainedModel:
    """The transformers model of a tiny family, float32, eval mode, every parameter random."""
    import torch
    import transformers

    model_class, config_class, values = _ROWS[name]
    config = getattr(transformers, config_class)(**{**json.loads(json.dumps(values)), **config_overrides})
    config.architectures = [model_class]
    config._attn_implementation = "eager"
    model = getattr(transformers, model_class)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    norm_center = 0.0 if config_class == "Gemma3TextConfig" else 1.0  # Gemma stores the multiplier minus one
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(noise / math.sqrt(parameter.shape[1]))
            elif key.endswith(".bias"):
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(norm_center + 0.2 * noise)
    return model


def hf_folder(
    path: Path,
    name: str,
    *,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    shards: int = 1,
    **config_overrides: Any,
) -> Path:
    """Write a tiny model as a Hugging Face folder: config, safetensors (in `shards` files), tokenizer, generation config.

    name is one of TINY_FAMILIES; config_overrides replace values of the family's transformers config. A tied head is not stored.
    """
    import torch
    from safetensors.torch import save_file

    model = random_model(name, seed=seed, **config_overrides)
    path.mkdir(parents=True, exist_ok=True)
    model.config.dtype = dtype
    model.config.save_pretrained(path)
    state = {key: value.to(getattr(torch, dtype)).contiguous() for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    keys = sorted(state)
    files = ["model.safetensors"] if shards == 1 else [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {key: files[i * shards // len(keys)] for i, key in enumerate(keys)}
    for file in files:
        save_file({key: state[key] for key in keys if weight_map[key] == file}, path / file, metadata={"format": "pt"})
    if shards > 1:
        total = sum(value.numel() * value.element_size() for value in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    write_tokenizer(path)
    generation = {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 2}
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")
    return path


def hf_model(path: Path) -> PreTrainedModel:
    """The folder as transformers runs it: float32, eval mode, plain attention."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a JSON file after `change` has altered its object in place."""
    value = json.loads(file.read_text(encoding="utf-8"))
    change(value)
    file.write_text(json.dumps(value, indent=2), encoding="utf-8")
