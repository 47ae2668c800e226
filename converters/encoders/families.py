"""The encoder families, one row each: what config.json calls sizes, and what the checkpoint calls tensors.

Tensors are listed with their names in a bare model; checkpoints with a head put the model's own name before them ("bert.").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class EncoderFamily:
    """model_type: of config.json. prefix: of tensor names in checkpoints with a head. keys: of config.json by fields of EncoderSpec.

    fixed: values of fields that config.json does not state. modules: names of modules by canonical role, with {i} for the layer; a role
    that is missing is one the family does not have. counts_positions: see EncoderSpec. harmless: more keys of config.json that change no
    output; only: keys that must have one of these values.
    """

    model_type: str
    prefix: str
    modules: Mapping[str, str]
    keys: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    counts_positions: bool = False
    harmless: frozenset[str] = frozenset()
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


_KEYS = {
    "n_layers": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_ff": "intermediate_size",
    "n_vocab": "vocab_size",
    "n_positions": "max_position_embeddings",
    "norm_eps": "layer_norm_eps",
    "activation": "hidden_act",
}
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
# Of a pooler that no embedding model of ours reads, and of heads.
_HARMLESS = frozenset({
    "classifier_dropout", "cross_attention_hidden_size", "directionality", "emb_size", "output_past", "pooler_fc_size",
    "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type", "pruned_heads", "tie_encoder_decoder",
    "tie_word_embeddings", "tie_weights_", "vocab_file",
})  # fmt: skip
_BERT_LAYER = {
    "layers.{i}.wq": "encoder.layer.{i}.attention.self.query",
    "layers.{i}.wk": "encoder.layer.{i}.attention.self.key",
    "layers.{i}.wv": "encoder.layer.{i}.attention.self.value",
    "layers.{i}.wo": "encoder.layer.{i}.attention.output.dense",
    "layers.{i}.attn_norm": "encoder.layer.{i}.attention.output.LayerNorm",
    "layers.{i}.up": "encoder.layer.{i}.intermediate.dense",
    "layers.{i}.down": "encoder.layer.{i}.output.dense",
    "layers.{i}.mlp_norm": "encoder.layer.{i}.output.LayerNorm",
}
_EMBEDDINGS = {
    "embed": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "embed_norm": "embeddings.LayerNorm",
}
_BERT = {**_EMBEDDINGS, "types": "embeddings.token_type_embeddings", **_BERT_LAYER}

# https://huggingface.co/docs/transformers/model_doc: bert, roberta, xlm-roberta, camembert, distilbert, mpnet
ENCODERS = (
    EncoderFamily(
        model_type="bert", prefix="bert.", modules=_BERT, keys={**_KEYS, "n_types": "type_vocab_size"}, harmless=_HARMLESS, only=_ONLY
    ),
    *(
        EncoderFamily(
            model_type=name,
            prefix="roberta.",
            modules=_BERT,
            keys={**_KEYS, "n_types": "type_vocab_size"},
            counts_positions=True,
            harmless=_HARMLESS,
            only=_ONLY,
        )
        for name in ("roberta", "xlm-roberta", "camembert")
    ),
    EncoderFamily(
        model_type="distilbert",
        prefix="distilbert.",
        modules={
            **_EMBEDDINGS,
            "layers.{i}.wq": "transformer.layer.{i}.attention.q_lin",
            "layers.{i}.wk": "transformer.layer.{i}.attention.k_lin",
            "layers.{i}.wv": "transformer.layer.{i}.attention.v_lin",
            "layers.{i}.wo": "transformer.layer.{i}.attention.out_lin",
            "layers.{i}.attn_norm": "transformer.layer.{i}.sa_layer_norm",
            "layers.{i}.up": "transformer.layer.{i}.ffn.lin1",
            "layers.{i}.down": "transformer.layer.{i}.ffn.lin2",
            "layers.{i}.mlp_norm": "transformer.layer.{i}.output_layer_norm",
        },
        keys={
            "n_layers": "n_layers",
            "n_embd": "dim",
            "n_heads": "n_heads",
            "n_ff": "hidden_dim",
            "n_vocab": "vocab_size",
            "n_positions": "max_position_embeddings",
            "activation": "activation",
        },
        fixed={"norm_eps": 1e-12, "n_types": 0},
        # positions that were made of sines are stored like others
        harmless=_HARMLESS | {"dropout", "qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds"},
        only=_ONLY,
    ),
    EncoderFamily(
        model_type="mpnet",
        prefix="mpnet.",
        modules={
            **_EMBEDDINGS,
            **_BERT_LAYER,
            "relative": "encoder.relative_attention_bias",
            "layers.{i}.wq": "encoder.layer.{i}.attention.attn.q",
            "layers.{i}.wk": "encoder.layer.{i}.attention.attn.k",
            "layers.{i}.wv": "encoder.layer.{i}.attention.attn.v",
            "layers.{i}.wo": "encoder.layer.{i}.attention.attn.o",
            "layers.{i}.attn_norm": "encoder.layer.{i}.attention.LayerNorm",
        },
        keys={**_KEYS, "n_buckets": "relative_attention_num_buckets"},
        fixed={"n_types": 0, "padding_id": 1},  # both written into the model's code, whatever config.json says
        counts_positions=True,
        harmless=_HARMLESS,
        only={**_ONLY, "relative_attention_num_buckets": (32,)},
    ),
)

# Tensors that compute no token's vector: heads, poolers, and buffers of place numbers that old versions saved.
LEFT_OUT = re.compile(
    r"(.*\.)?(pooler\.|cls\.|lm_head\.|vocab_transform\.|vocab_layer_norm\.|vocab_projector\.|embeddings\.(position_ids|token_type_ids)$).*"
)


def encoder_family(model_type: object) -> EncoderFamily | None:
    return next((row for row in ENCODERS if row.model_type == model_type), None)
