"""Tiny random encoders in Hugging Face layout, the transformers model that reads them, and ONNX files that torch exports of them.

Sizes differ from each other, and are no multiples of a block of 32, so that a swapped axis or an unfilled block fails. Every weight is
random, norms and biases too. Same family and seed, same bytes.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tiny import TRAINING_TEXT

N_VOCAB = 211
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA_SPECIALS = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")  # padding is token 1, as in RoBERTa

_BERT = {
    "vocab_size": N_VOCAB,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 50,
    "max_position_embeddings": 70,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
}
_ROBERTA = {**_BERT, "type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_DISTILBERT = {
    "vocab_size": N_VOCAB,
    "dim": 36,
    "n_layers": 2,
    "n_heads": 3,
    "hidden_dim": 50,
    "max_position_embeddings": 70,
    "activation": "gelu",
}

# name -> (transformers model class, its config class, config values)
ROWS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", {**_BERT, "type_vocab_size": 2}),
    "bert-tanh": ("BertModel", "BertConfig", {**_BERT, "type_vocab_size": 2, "hidden_act": "gelu_new"}),
    "bert-relu": ("BertModel", "BertConfig", {**_BERT, "type_vocab_size": 3, "hidden_act": "relu"}),
    "roberta": ("RobertaModel", "RobertaConfig", _ROBERTA),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaConfig", _ROBERTA),
    "camembert": ("CamembertModel", "CamembertConfig", _ROBERTA),
    "distilbert": ("DistilBertModel", "DistilBertConfig", _DISTILBERT),
    "mpnet": ("MPNetModel", "MPNetConfig", {**_BERT, "relative_attention_num_buckets": 32, "pad_token_id": 1}),
}
NAMES = tuple(ROWS)


def hf_encoder(
    folder: Path,
    name: str = "bert",
    *,
    seed: int = 0,
    prefix: str = "",
    pooling: Sequence[str] | None = ("mean_tokens",),
    normalize: bool = True,
    dense: int | None = None,
    max_seq_length: int | None = None,
    prompts: Mapping[str, str] | None = None,
    **config: Any,
) -> Path:
    """A model folder with safetensors, tokenizer and the files of sentence-transformers. prefix: of tensor names.

    pooling: flags of 1_Pooling/config.json; None leaves all of that out. dense: outputs of a linear layer with tanh behind pooling.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    model = random_encoder(name, seed, **config)
    model.config.architectures = [ROWS[name][0]]
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    save_file({f"{prefix}{key}": value.clone() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    write_tokenizer(folder, roberta=name in ("roberta", "xlm-roberta", "camembert", "mpnet"))
    if pooling is None:
        return folder
    steps = [("", "Transformer"), ("1_Pooling", "Pooling")]
    width = model.config.hidden_size
    flags = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    (folder / "1_Pooling").mkdir()
    described = {"word_embedding_dimension": width, **{f"pooling_mode_{flag}": flag in pooling for flag in flags}}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(described))
    if dense is not None:
        steps.append(("2_Dense", "Dense"))
        (folder / "2_Dense").mkdir()
        n_in = width * len(pooling)
        options = {"in_features": n_in, "out_features": dense, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}
        (folder / "2_Dense" / "config.json").write_text(json.dumps(options))
        generator = torch.Generator().manual_seed(seed)
        weight, bias = torch.randn(dense, n_in, generator=generator) / n_in**0.5, torch.randn(dense, generator=generator) / 4
        save_file({"linear.weight": weight, "linear.bias": bias}, folder / "2_Dense" / "model.safetensors")
    if normalize:
        steps.append((f"{len(steps)}_Normalize", "Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (path, kind) in enumerate(steps)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    if max_seq_length is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_seq_length, "do_lower_case": False}))
    if prompts is not None:
        (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": dict(prompts), "default_prompt_name": None}))
    return folder


def random_encoder(name: str, seed: int = 0, **config: Any) -> Any:
    """The transformers model of a row, every weight random."""
    import torch
    import transformers

    model_class, config_class, values = ROWS[name]
    settings = getattr(transformers, config_class)(**{**values, **config})
    settings._attn_implementation = "eager"
    model = getattr(transformers, model_class)(settings).eval()
    generator = torch.Generator().manual_seed(seed)
    for key, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() == 1:
            weight.data = noise / 4 + (1.0 if key.endswith("weight") else 0.0)
        else:
            weight.data = noise * (1.0 if "embedding" in key or "relative" in key else weight.shape[1] ** -0.5)
    return model


def hf_oracle(folder: Path) -> Any:
    """The transformers model of a folder that has no prefix."""
    import transformers

    return transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()


def token_vectors(model: Any, ids: Sequence[int]) -> Any:
    """Last hidden state of one text alone, (n_tokens, n_embd)."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)])).last_hidden_state[0]


def write_tokenizer(folder: Path, *, roberta: bool = False) -> None:
    """A lower-casing WordPiece tokenizer of at most N_VOCAB tokens, which cuts at 9 tokens and pads to 12 by its own file: settings that
    many published files have and that nobody who embeds wants."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = list(ROBERTA_SPECIALS if roberta else SPECIALS)
    trainer = trainers.WordPieceTrainer(vocab_size=N_VOCAB, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    )
    tokenizer.enable_truncation(9)
    tokenizer.enable_padding(length=12, pad_id=tokenizer.token_to_id("[PAD]"))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "model_max_length": int(1e30)}))


def onnx_encoder(folder: Path, path: Path, *, external: bool = False, pooled: bool = False) -> Path:
    """The model of a folder, exported to `path` by torch. external: weights in a file of their own. pooled: with a sentence_embedding."""
    import onnx
    import torch

    model = hf_oracle(folder)
    types = getattr(model.config, "type_vocab_size", 0) > 1 and model.config.model_type == "bert"
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.auto_model = model

        def forward(self, *inputs: torch.Tensor) -> Any:
            hidden = self.auto_model(**dict(zip(names, inputs, strict=True))).last_hidden_state
            return (hidden, hidden[:, 0]) if pooled else hidden

    ids = torch.arange(5, 19).reshape(2, 7)
    outputs = ["last_hidden_state", *(["sentence_embedding"] if pooled else [])]
    axes = {name: {0: "batch_size", 1: "sequence_length"} for name in (*names, "last_hidden_state")}
    path.parent.mkdir(parents=True, exist_ok=True)
    inputs = (ids, torch.ones_like(ids), torch.zeros_like(ids))[: len(names)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Plain(), inputs, str(path), dynamo=False, input_names=names, output_names=outputs, dynamic_axes=axes, opset_version=14
        )
    if external:
        loaded = onnx.load(path)
        onnx.save_model(loaded, path, save_as_external_data=True, location=f"{path.name}_data", size_threshold=64)
    return path
