"""Small tokenizers, true to their families in structure, trained on the spot with the `tokenizers` library.

    tiny_tokenizer(folder, "llama2", 600)                      # tokenizer.json and tokenizer_config.json
    write_vocab(path, read_hf_tokenizer(folder).vocabulary)    # a GGUF without tensors
    LlamaVocab(path).tokenize(text)                            # llama.cpp's ids
    open_family(folder, "llama2")                              # all of it

What a family has - special tokens, cuts, normalizer, who adds BOS - is as published; the vocabulary is not.
"""

from __future__ import annotations

import ctypes
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from edgeq.converters.tokenizers.gguf import read_gguf_tokenizer, tokenizer_fields
from edgeq.converters.tokenizers.hf import read_hf_tokenizer
from edgeq.converters.tokenizers.library import LibraryTokenizer
from edgeq.converters.tokenizers.llamacpp import general_name
from edgeq.converters.tokenizers.pretokenizers import LLAMA3, O200K, QWEN2, TEKKEN
from edgeq.gguf_fields import Field
from edgeq.gguf_file import read_header
from edgeq.gguf_write import header_bytes
from edgeq.model import Vocabulary

TEXT = (Path(__file__).parent / "data" / "multilingual.txt").read_bytes().decode()
# Nothing to learn from what looks like a special token: "<" and "s>" as tokens would make "<s>" in llama.cpp.
_TRAINING_TEXT = "\n".join(line for line in TEXT.split("\n") if "<s>" not in line and "<end_of_turn>" not in line).replace("e>", "e >")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """special: control tokens. plain: added tokens that are not special. regex: cut of a byte-level one; "" for GPT-2's own.

    before: tokens that stand at the beginning of the vocabulary (sentencepiece-like families), special ones included.
    """

    special: tuple[str, ...]
    bos: str | None
    eos: str
    pad: str | None = None
    unk: str | None = None
    plain: tuple[str, ...] = ()
    regex: str | None = None
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False
    rstrip: tuple[str, ...] = ()
    normalizer: Any = None
    pre_tokenizer: Any = None
    spm: bool = False
    runs: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)


_PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
_PHI3 = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")

KINDS = {
    "smollm2": Tiny(
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"),
        bos="<|im_start|>",
        eos="<|im_end|>",
        pad="<|im_end|>",
        unk="<|endoftext|>",
        digits=True,
        config={"add_prefix_space": False},
    ),
    "gpt2": Tiny(special=("<|endoftext|>",), bos="<|endoftext|>", eos="<|endoftext|>"),
    "llama3": Tiny(
        special=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        regex=LLAMA3,
        ignore_merges=True,
        add_bos=True,
    ),
    "qwen2": Tiny(
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        plain=("<tool_call>", "</tool_call>", "<think>"),
        bos=None,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        regex=QWEN2,
        nfc=True,
        config={"add_bos_token": False},
    ),
    "phi4": Tiny(
        special=("<|endoftext|>", "<|system|>", "<|user|>", "<|end|>", "<|assistant|>"),
        plain=("<|tool|>",),
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        regex=O200K,
        config={"tokenizer_class": "GPT2Tokenizer"},
    ),
    "tekken": Tiny(special=("<unk>", "<s>", "</s>", "[INST]"), bos="<s>", eos="</s>", regex=TEKKEN, ignore_merges=True, add_bos=True),
    "llama2": Tiny(
        special=("<unk>", "<s>", "</s>"), bos="<s>", eos="</s>", unk="<unk>", spm=True, add_bos=True, normalizer=_PREPEND, runs="▁"
    ),
    "mistral3": Tiny(
        special=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        bos="<s>",
        eos="</s>",
        unk="<unk>",
        spm=True,
        add_bos=True,
        pre_tokenizer=pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False),
        config={"add_prefix_space": True},
    ),
    "phi3": Tiny(
        special=("<unk>", "<s>", *_PHI3),
        plain=("</s>",),
        rstrip=("</s>", *_PHI3[1:]),
        bos="<s>",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        unk="<unk>",
        spm=True,
        normalizer=_PREPEND,
        runs="▁",
        config={"add_bos_token": False},
    ),
    "gemma3": Tiny(
        special=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        plain=("\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<b>", "</b>", "<unused0>"),
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        unk="<unk>",
        spm=True,
        add_bos=True,
        normalizer=normalizers.Replace(" ", "▁"),
        pre_tokenizer=pre_tokenizers.Split(" ", "merged_with_previous"),
        runs="▁",
    ),
}


def tiny_tokenizer(folder: Path, kind: str, n_vocab: int = 600) -> Path:
    """Train a tokenizer of a kind in KINDS and write it to folder in Hugging Face layout. Returns folder."""
    tiny = KINDS[kind]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _spaces(tiny, n_vocab) if tiny.spm else _byte_level(tiny, n_vocab)
    if tiny.add_bos:
        assert tiny.bos is not None
        special = [(tiny.bos, tokenizer.token_to_id(tiny.bos))]
        template = processors.TemplateProcessing(single=f"{tiny.bos} $A", pair=f"{tiny.bos} $A {tiny.bos} $B", special_tokens=special)
        tokenizer.post_processor = template if tiny.spm else processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    elif tiny.spm:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": tiny.bos, "eos_token": tiny.eos, "pad_token": tiny.pad, "unk_token": tiny.unk}
    config = {**{role: token for role, token in named.items() if token}, "chat_template": CHATML, **tiny.config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _byte_level(tiny: Tiny, n_vocab: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=tiny.ignore_merges))
    if tiny.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if tiny.digits else []
    if tiny.regex is not None:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(tiny.regex), "isolated"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=tiny.regex is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level]) if steps else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    _add(tokenizer, tiny)  # so that training leaves them out of merges; then again behind the vocabulary
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab - len(tiny.special + tiny.plain), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([_TRAINING_TEXT], trainer)
    trained = json.loads(tokenizer.to_str())
    trained["added_tokens"] = []
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(trained))
    _add(tokenizer, tiny)
    return tokenizer


def _spaces(tiny: Tiny, n_vocab: int) -> tokenizers.Tokenizer:
    """Merges over characters with byte fallback: specials and bytes first, then what training finds, as sentencepiece lays it out."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("▁+[^▁\n]*|[^▁\n]+|\n"), "isolated")
    front = [*tiny.special, *tiny.plain, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=n_vocab - len(front), limit_alphabet=120, show_progress=False)
    trained.train_from_iterator([_TRAINING_TEXT.replace("\n", " \n")], trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    runs = [(tiny.runs * a, tiny.runs * (n - a)) for n in range(2, 9) for a in range(1, n)] if tiny.runs else []
    merges = list(dict.fromkeys([*runs, *map(tuple, model["merges"])]))
    vocab = {token: id for id, token in enumerate(dict.fromkeys([*front, *pieces, *(left + right for left, right in merges)]))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=tiny.unk, fuse_unk=True, byte_fallback=True))
    if tiny.normalizer is not None:
        tokenizer.normalizer = tiny.normalizer
    if tiny.pre_tokenizer is not None:
        tokenizer.pre_tokenizer = tiny.pre_tokenizer
    strip = [] if isinstance(tiny.pre_tokenizer, pre_tokenizers.Split) else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    _add(tokenizer, tiny)
    return tokenizer


def _add(tokenizer: tokenizers.Tokenizer, tiny: Tiny) -> None:
    def token(text: str, special: bool) -> tokenizers.AddedToken:
        return tokenizers.AddedToken(text, special=special, normalized=False, rstrip=text in tiny.rstrip)

    tokenizer.add_special_tokens([token(text, True) for text in tiny.special])
    tokenizer.add_tokens([token(text, False) for text in tiny.plain])


def write_vocab(path: Path, vocabulary: Vocabulary, *, name: str = "tiny") -> Path:
    """A GGUF file of metadata alone, which llama.cpp loads with vocab_only."""
    fields = [Field.string("general.architecture", "llama"), Field.string("general.name", name)]
    path.write_bytes(header_bytes([*fields, *tokenizer_fields(vocabulary)], []))
    return path


class LlamaVocab:
    """llama.cpp's own tokenizer, in this process, from a GGUF file loaded with vocab_only."""

    def __init__(self, path: Path) -> None:
        from edgeq.runtime.llama import library

        self.lib = llama_cpp = library()  # its log stays where edgeq put it: there is one for the whole process
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, f"llama.cpp does not load {path}"
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        data = text.encode()
        ids = (self.lib.llama_token * (len(data) + 8))()
        n = self.lib.llama_tokenize(self.vocab, data, len(data), ids, len(ids), add_special, parse_special)
        assert n >= 0
        return list(ids[:n])

    def detokenize(self, ids: Sequence[int]) -> str:
        tokens, out = (self.lib.llama_token * len(ids))(*ids), ctypes.create_string_buffer(64 * len(ids) + 64)
        n = self.lib.llama_detokenize(self.vocab, tokens, len(ids), out, len(out), False, True)
        return out.raw[:n].decode(errors="replace")

    def is_end(self, id: int) -> bool:
        return self.lib.llama_vocab_is_eog(self.vocab, id)

    def close(self) -> None:
        self.lib.llama_model_free(self.model)


@dataclass(frozen=True)
class Family:
    """hf: as read from the folder; gguf: as read from the GGUF file written for it; llama: llama.cpp on that file."""

    folder: Path
    file: Path
    hf: LibraryTokenizer
    gguf: LibraryTokenizer
    llama: LlamaVocab

    def readable(self, text: str) -> str:
        """The text as llama.cpp needs it: composed, where the family's own tokenizer composes."""
        return unicodedata.normalize("NFC", text) if any("normal form C" in differs for differs in self.hf.differs) else text


def open_family(folder: Path, kind: str) -> Family:
    hf = read_hf_tokenizer(tiny_tokenizer(folder, kind))
    file = write_vocab(folder / "vocab.gguf", hf.vocabulary, name=general_name(hf.vocabulary, "tiny"))
    return Family(folder, file, hf, read_gguf_tokenizer(read_header(file)), LlamaVocab(file))
