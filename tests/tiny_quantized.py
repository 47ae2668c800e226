"""Tiny models quantized as published checkpoints are: encoders written from each method's layout, apart from the code that reads them.

    folder = hf_folder(tmp_path / "m", "llama")
    expected = quantize(folder, gptq(bits=4, group_size=32))

rewrites model.safetensors and config.json, and returns what the method's arithmetic gives for every quantized weight, in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny import edit_json

Array = np.ndarray
Encoder = Callable[[Array], tuple[dict[str, torch.Tensor], Array]]


@dataclass(frozen=True)
class Method:
    """config: the quantization_config. encode: weight (n_out, n_in) to tensors by suffix and the decoded weight, float64."""

    config: Mapping[str, Any]
    encode: Encoder


def quantize(folder: Path, method: Method, *, skip: tuple[str, ...] = ("lm_head", "embed")) -> dict[str, Array]:
    file = folder / "model.safetensors"
    state = load_file(file)
    out: dict[str, torch.Tensor] = {}
    expected = {}
    for name, tensor in state.items():
        if tensor.ndim != 2 or any(word in name for word in skip):
            out[name] = tensor
            continue
        parts, decoded = method.encode(tensor.double().numpy())
        expected[name] = decoded
        out |= {f"{name.removesuffix('.weight')}.{suffix}": value for suffix, value in parts.items()}
    save_file({name: value.contiguous() for name, value in out.items()}, file, metadata={"format": "pt"})
    edit_json(folder / "config.json", lambda c: c.update(quantization_config=dict(method.config)))
    return expected


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite model.safetensors after `change` has altered its tensors in place."""
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


def _affine(w: Array, bits: int, group: Array, *, symmetric: bool, dtype: type = np.float16) -> tuple[Array, Array, Array]:
    """Codes (n_out, n_in), scales and zero points (n_out, groups); scales rounded to dtype."""
    n_groups = int(group.max()) + 1
    most = (1 << bits) - 1
    scales, zeros = np.zeros((len(w), n_groups)), np.zeros((len(w), n_groups))
    for g in range(n_groups):
        part = w[:, group == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            scales[:, g] = 2 * np.maximum(-low, high) / most
            zeros[:, g] = (most + 1) // 2
        else:
            scales[:, g] = (high - low) / most
    scales = np.maximum(scales, 1e-4).astype(dtype).astype(np.float64)
    if not symmetric:
        for g in range(n_groups):
            zeros[:, g] = np.clip(np.round(-np.minimum(w[:, group == g].min(1), 0) / scales[:, g]), 0, most)
    codes = np.clip(np.round(w / scales[:, group]) + zeros[:, group], 0, most).astype(np.int64)
    return codes, scales, zeros.astype(np.int64)


def _decode(codes: Array, scales: Array, zeros: Array, group: Array) -> Array:
    return (codes - zeros[:, group]) * scales[:, group]


def _words(values: Array, bits: int) -> torch.Tensor:
    """Values back to back along the last axis, from the low bits up, into int32 words; the end is filled with zeros."""
    rows = []
    for row in values.tolist():
        stream = sum(value << (bits * i) for i, value in enumerate(row))
        n_words = -(-len(row) * bits // 32)
        rows.append([stream >> (32 * i) & 0xFFFFFFFF for i in range(n_words)])
    return torch.from_numpy(np.array(rows, dtype=np.uint32).view(np.int32))


def gptq(
    bits: int = 4, group_size: int = 32, *, symmetric: bool = True, act_order: bool = False, v2: bool = False, scale: Any = torch.float16
) -> Method:
    def encode(w: Array) -> tuple[dict[str, torch.Tensor], Array]:
        n_in = w.shape[1]
        size = n_in if group_size == -1 else group_size
        group = np.arange(n_in) // size
        if act_order:
            group = group[np.random.default_rng(n_in).permutation(n_in)]
        codes, scales, zeros = _affine(w, bits, group, symmetric=symmetric)
        if not v2 and not symmetric:
            zeros = np.maximum(zeros, 1)
        stored = zeros if v2 else zeros - 1
        tensors = {
            "qweight": _words(codes.T.T, bits).T,
            "qzeros": _words(stored.T, bits),
            "scales": torch.from_numpy(scales.T.copy()).to(scale),
            "g_idx": torch.from_numpy(group.astype(np.int32)),
        }
        return tensors, _decode(codes, scales, zeros, group)

    config = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": act_order, "sym": symmetric}
    return Method({**config, "checkpoint_format": "gptq_v2" if v2 else "gptq", "damp_percent": 0.01, "true_sequential": True}, encode)


def awq(group_size: int = 32, *, round_zeros: bool = False) -> Method:
    """round_zeros: zero points and scales such that Q4_1's minima are exact in F16 (scales with few bits)."""

    def pack(values: Array) -> torch.Tensor:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        packed = np.zeros((values.shape[0], values.shape[1] // 8), dtype=np.uint32)
        for column in range(packed.shape[1]):
            for i in range(8):
                packed[:, column] |= values[:, column * 8 + order[i]].astype(np.uint32) << np.uint32(4 * i)
        return torch.from_numpy(packed.view(np.int32))

    def encode(w: Array) -> tuple[dict[str, torch.Tensor], Array]:
        size = w.shape[1] if group_size == -1 else group_size
        group = np.arange(w.shape[1]) // size
        codes, scales, zeros = _affine(w, 4, group, symmetric=False)
        if round_zeros:
            scales = 2.0 ** np.ceil(np.log2(scales))
            codes = np.clip(np.round(w / scales[:, group]) + zeros[:, group], 0, 15).astype(np.int64)
        tensors = {"qweight": pack(codes.T), "qzeros": pack(zeros.T), "scales": torch.from_numpy(scales.T.copy()).half()}
        return tensors, _decode(codes, scales, zeros, group)

    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", "zero_point": True}
    return Method({**config, "modules_to_not_convert": ["lm_head"]}, encode)


# The tables as printed in bitsandbytes.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
FP4 = [x / 12 for x in [0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3]]


def bnb4(kind: str = "nf4", blocksize: int = 64, *, nested: bool = False, storage: torch.dtype = torch.uint8) -> Method:
    table = np.array(NF4 if kind == "nf4" else FP4, dtype=np.float32)

    def encode(w: Array) -> tuple[dict[str, torch.Tensor], Array]:
        flat = w.reshape(-1)
        blocks = np.arange(flat.size) // blocksize
        n_blocks = int(blocks[-1]) + 1
        absmax = np.maximum.reduceat(np.abs(flat), np.arange(0, flat.size, blocksize)).astype(np.float32)
        extra: dict[str, torch.Tensor] = {}
        state: dict[str, Any] = {"quant_type": kind, "blocksize": blocksize, "dtype": "bfloat16", "shape": list(w.shape)}
        if nested:
            offset = float(absmax.mean(dtype=np.float32))
            dynamic = np.linspace(-1, 1, 256, dtype=np.float32) ** 3  # any table of 256 values: it is stored
            shifted = (absmax - offset).astype(np.float32)
            outer = np.arange(n_blocks) // 256
            tops = np.maximum.reduceat(np.abs(shifted), np.arange(0, n_blocks, 256))
            codes = np.abs((shifted / tops[outer])[:, None] - dynamic).argmin(1).astype(np.uint8)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            extra = {"weight.nested_absmax": torch.from_numpy(tops), "weight.nested_quant_map": torch.from_numpy(dynamic)}
            used = dynamic.astype(np.float64)[codes] * tops[outer] + offset
            stored = torch.from_numpy(codes)
        else:
            used, stored = absmax.astype(np.float64), torch.from_numpy(absmax)
        index = np.abs((flat / used[blocks])[:, None] - table).argmin(1)
        padded = np.append(index, 0) if index.size % 2 else index
        packed = torch.from_numpy((padded[::2] << 4 | padded[1::2]).astype(np.uint8)).view(storage).reshape(-1, 1)
        text = torch.from_numpy(np.frombuffer(json.dumps(state).encode(), dtype=np.uint8).copy())
        tensors = {"weight": packed, "weight.absmax": stored, "weight.quant_map": torch.from_numpy(table.copy()), **extra}
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = text
        return tensors, (table.astype(np.float64)[index] * used[blocks]).reshape(w.shape)

    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
    }
    more = {"bnb_4bit_use_double_quant": nested, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8"}
    return Method({**config, **more, "llm_int8_skip_modules": ["lm_head"], "llm_int8_threshold": 6.0}, encode)


def bnb8() -> Method:
    def encode(w: Array) -> tuple[dict[str, torch.Tensor], Array]:
        scb = np.abs(w).max(1).astype(np.float32)
        codes = np.round(w * 127 / scb[:, None]).astype(np.int8)
        tensors = {"weight": torch.from_numpy(codes), "SCB": torch.from_numpy(scb), "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return tensors, codes * (scb[:, None].astype(np.float64) / 127)

    return Method({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 6.0}, encode)


_HQQ_PACKING = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}


def hqq(nbits: int = 4, group_size: int = 32, *, axis: int = 1, as_float: bool = False, scale: Any = torch.float16) -> Method:
    def encode(w: Array) -> tuple[dict[str, torch.Tensor], Array]:
        shaped = w.reshape(-1, group_size) if axis == 1 else w.reshape(group_size, -1)
        low, high = shaped.min(axis, keepdims=True), shaped.max(axis, keepdims=True)
        step = torch.from_numpy((high - low) / ((1 << nbits) - 1)).to(scale)
        steps = step.double().numpy()
        zero = torch.from_numpy(-low / steps).to(scale)
        zeros = zero.double().numpy()
        codes = np.clip(np.round(shaped / steps + zeros), 0, (1 << nbits) - 1).astype(np.int64)
        per = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}[nbits]
        rows = -(-len(codes) // per)
        full = np.zeros((rows * per, codes.shape[1]), dtype=np.int64)
        full[: len(codes)] = codes
        packed = np.zeros((rows, codes.shape[1]), dtype=np.int64)
        for i in range(per):
            packed |= full[i * rows : (i + 1) * rows] << (nbits * (per - 1 - i))
        w_q = torch.from_numpy(packed.astype(np.int32 if nbits == 3 else np.uint8))
        tensors = {"W_q": w_q.view(torch.float16) if as_float else w_q, "scale": step, "zero": zero}
        tensors |= {key: torch.tensor(value, dtype=torch.int32) for key, value in (("nbits", nbits), ("axis", axis))}
        tensors |= {"group_size": torch.tensor(group_size, dtype=torch.int32), "shape": torch.tensor(w.shape)}
        flags = ("channel_wise", "optimize", "round_zero", "offload_meta", "encoded_state_dict", "stores_quant_config")
        tensors |= {key: torch.tensor(1, dtype=torch.uint8) for key in flags}
        tensors["view_as_float"] = torch.tensor(int(as_float), dtype=torch.uint8)
        for key, text in (("packing", _HQQ_PACKING[nbits]), ("unpack_view_dtype", "torch.uint8"), ("compute_dtype", "torch.float16")):
            tensors[key] = torch.tensor([ord(c) for c in text], dtype=torch.uint8)
        return tensors, ((codes - zeros) * steps).reshape(w.shape)

    weight = {"nbits": nbits, "channel_wise": True, "group_size": group_size, "optimize": True, "round_zero": False, "axis": axis}
    params = {"weight_quant_params": weight, "scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}
    return Method({"quant_method": "hqq", "quant_config": params, "skip_modules": ["lm_head"]}, encode)


def compressed(
    form: str = "pack-quantized",
    *,
    bits: int = 4,
    strategy: str = "group",
    group_size: int | None = 32,
    symmetric: bool = True,
    kind: str = "int",
    scale: Any = torch.bfloat16,
    block: tuple[int, int] = (32, 64),
) -> Method:
    def groups(w: Array) -> Array:
        return np.arange(w.shape[1]) // (group_size if strategy == "group" and group_size else w.shape[1])

    def encode_int(w: Array) -> tuple[dict[str, torch.Tensor], Array]:
        group = groups(w)
        shaped = w.reshape(1, -1) if strategy == "tensor" else w
        flat_group = np.zeros(shaped.shape[1], dtype=int) if strategy == "tensor" else group
        codes, scales, zeros = _affine(shaped, bits, flat_group, symmetric=symmetric)
        stored = torch.from_numpy(scales).to(scale)
        scales = stored.double().numpy()
        decoded = _decode(codes, scales, zeros, flat_group).reshape(w.shape)
        codes = codes.reshape(w.shape)
        half = 1 << (bits - 1)
        tensors = {"weight_scale": stored[0] if strategy == "tensor" else stored}
        if form == "pack-quantized":
            tensors |= {"weight_packed": _words(codes, bits), "weight_shape": torch.tensor(w.shape)}
            if not symmetric:
                tensors["weight_zero_point"] = _words(zeros.T, bits).T
        else:
            tensors["weight"] = torch.from_numpy((codes - half).astype(np.int8))
            if not symmetric:
                tensors["weight_zero_point"] = torch.from_numpy((zeros - half).astype(np.int8))
        return tensors, decoded

    config: dict[str, Any] = {"num_bits": bits, "type": kind, "symmetric": symmetric, "strategy": strategy, "dynamic": False}
    config |= {"group_size": group_size if strategy == "group" else None, "actorder": None, "observer": "minmax"}
    if strategy == "block":
        config["block_structure"] = list(block)
    group = {"targets": ["Linear"], "weights": config, "input_activations": None, "output_activations": None}
    whole = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    encode = encode_int if kind == "int" else _float8(strategy, "weight_scale", scale, block)
    return Method({**whole, "quantization_status": "compressed", "kv_cache_scheme": None, "version": "0.9.1"}, encode)


def _float8(strategy: str, suffix: str, dtype: Any, block: tuple[int, int]) -> Encoder:
    def encode(w: Array) -> tuple[dict[str, torch.Tensor], Array]:
        n_out, n_in = w.shape
        height, width = {"tensor": (n_out, n_in), "channel": (1, n_in), "block": block}[strategy]
        shape = (-(-n_out // height), -(-n_in // width))
        row, column = np.arange(n_out) // height, np.arange(n_in) // width
        tops = np.zeros(shape)
        for r in range(shape[0]):
            for c in range(shape[1]):
                tops[r, c] = np.abs(w[np.ix_(row == r, column == c)]).max() / 448
        stored = torch.from_numpy(tops).to(dtype)
        spread = stored.double().numpy()[np.ix_(row, column)]
        codes = torch.from_numpy(w / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        scale = stored.reshape(()) if strategy == "tensor" else stored
        return {"weight": codes, suffix: scale}, codes.double().numpy() * spread

    return encode


def fp8(block: tuple[int, int] | None = (32, 64), *, dtype: Any = torch.float32) -> Method:
    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": None if block is None else list(block),
    }
    strategy, suffix = ("tensor", "weight_scale") if block is None else ("block", "weight_scale_inv")
    return Method(config, _float8(strategy, suffix, dtype, block or (1, 1)))


def methods() -> Iterator[tuple[str, Method]]:
    """One of each kind."""
    for bits in (2, 4, 8):
        yield f"gptq{bits}", gptq(bits)
    yield "gptq-asymmetric", gptq(4, symmetric=False)
    yield "gptq-v2", gptq(4, symmetric=False, v2=True)
    yield "gptq-act-order", gptq(4, act_order=True)
    yield "gptq-per-row", gptq(4, -1)
    yield "gptq-short-last-group", gptq(4, 48)
    yield "awq", awq()
    yield "awq-per-row", awq(-1)
    yield "nf4", bnb4()
    yield "nf4-nested", bnb4(nested=True)
    yield "nf4-bfloat16-storage", bnb4(storage=torch.bfloat16)
    yield "fp4", bnb4("fp4")
    yield "int8", bnb8()
    for nbits in (1, 2, 3, 4, 8):
        yield f"hqq{nbits}", hqq(nbits)
    yield "hqq-axis-0", hqq(axis=0)
    yield "hqq-3bit-axis-0", hqq(3, axis=0)
    yield "hqq-view-as-float", hqq(as_float=True, group_size=64)
    yield "hqq-bfloat16", hqq(scale=torch.bfloat16)
    yield "packed-int4", compressed()
    yield "packed-int4-asymmetric", compressed(symmetric=False)
    yield "packed-int8-channel", compressed(bits=8, strategy="channel")
    yield "packed-int8", compressed(bits=8, symmetric=False)
    yield "int8-channel", compressed("int-quantized", bits=8, strategy="channel")
    yield "int8-tensor", compressed("int-quantized", bits=8, strategy="tensor", symmetric=False)
    yield "float8-tensor", compressed("float-quantized", bits=8, kind="float", strategy="tensor")
    yield "float8-channel", compressed("float-quantized", bits=8, kind="float", strategy="channel")
    yield "float8-block", compressed("float-quantized", bits=8, kind="float", strategy="block", scale=torch.float32)
    yield "fp8-block", fp8()
    yield "fp8-block-bfloat16", fp8(dtype=torch.bfloat16)
    yield "fp8-tensor", fp8(None)
