"""Cuts of elastic files: equal to exports of models that were cut beforehand, run by llama.cpp, and refused with a reason."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.elastic import Kept
from edgeq.errors import OutputError, PackageError, PlanError, SourceError, UnsupportedError
from edgeq.gguf_fields import Field
from edgeq.gguf_file import TensorLayout, read_header
from edgeq.gguf_write import TensorData, header_bytes, predicted_bytes, write_gguf
from edgeq.grids import F16, F32, GRIDS, Grid
from edgeq.runtime import cut as cut_module
from edgeq.runtime.cut import cut_gguf, cut_to_memory
from edgeq.runtime.cut_plan import BIASES, Extras, Replacement, cut_bytes, plan_cut, size_label

N_EMBD, HEAD_DIM, GQA, N_FF, N_KV, N_LAYERS, N_VOCAB = 64, 16, 2, 96, 3, 4, 7
BIASED = BIASES["deci"]


def packed_rows(rng: np.random.Generator, n_rows: int, n_cols: int, grid: Grid) -> np.ndarray:
    return rng.integers(0, 256, (n_rows, grid.row_bytes(n_cols)), dtype=np.uint8)


def shapes(*, n_kv: int = N_KV, n_ff: int = N_FF) -> dict[str, tuple[int, ...]]:
    """Tensors of a layer with every bias, in the carrier's order."""
    q, kv = n_kv * GQA * HEAD_DIM, n_kv * HEAD_DIM
    matrices = {"attn_q": (q, N_EMBD), "attn_k": (kv, N_EMBD), "attn_v": (kv, N_EMBD), "attn_output": (N_EMBD, q)}
    mlp = {"ffn_gate": (n_ff, N_EMBD), "ffn_up": (n_ff, N_EMBD), "ffn_down": (N_EMBD, n_ff)}
    found: dict[str, tuple[int, ...]] = {}
    for norm, group in (("attn_norm", matrices), ("ffn_norm", mlp)):
        found[f"{norm}.weight"] = (N_EMBD,)
        for name, shape in group.items():
            found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


class Made:
    """Random packed bytes by tensor name, and the elastic file of them. No value means anything: cutting must not look at values."""

    def __init__(self, grid: Grid, *, wide: int = 1, arch: str = "deci", biases: bool = True) -> None:
        self.grid, self.wide, self.arch = grid, wide, arch
        rng = np.random.default_rng(5)
        self.data: dict[str, tuple[tuple[int, ...], Grid, np.ndarray]] = {}
        self.add(rng, "token_embd.weight", (N_VOCAB, N_EMBD * wide))
        for i in range(N_LAYERS):
            for name, shape in shapes().items():
                if biases or not name.endswith(".bias"):
                    self.add(rng, f"blk.{i}.{name}", tuple(n * wide for n in shape))
        self.add(rng, "output_norm.weight", (N_EMBD * wide,))

    def add(self, rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> None:
        grid = self.grid if len(shape) == 2 else F32
        self.data[name] = shape, grid, packed_rows(rng, shape[0] if len(shape) == 2 else 1, shape[-1], grid)

    def fields(self, n_ff: tuple[int, ...], n_kv: tuple[int, ...]) -> list[Field]:
        a, w = self.arch, self.wide
        sizes = (("feed_forward_length", n_ff), ("attention.head_count", [n * GQA for n in n_kv]), ("attention.head_count_kv", n_kv))
        return [
            Field.string("general.architecture", a),
            Field.string("general.name", "cut me"),
            Field.u32(f"{a}.block_count", N_LAYERS),
            Field.u32(f"{a}.embedding_length", N_EMBD * w),
            *(Field.i32s(f"{a}.{k}", v) if a == "deci" else Field.u32(f"{a}.{k}", v[0]) for k, v in sizes),
            Field.u32(f"{a}.attention.key_length", HEAD_DIM * w),
            Field.strings("tokenizer.ggml.tokens", [f"t{i}" for i in range(N_VOCAB)]),
        ]

    def write(self, path: Path, kept: Kept | None = None) -> Path:
        """The elastic file, or, with `kept`, what an export of the sliced tensors is: sliced here by plain numpy."""
        w = self.wide
        n_ff, n_kv = ((N_FF * w,) * N_LAYERS, (N_KV,) * N_LAYERS) if kept is None else (kept.n_ff, kept.n_kv)
        tensors = []
        for name, (shape, grid, packed) in self.data.items():
            if name.startswith("blk."):
                _, layer, role = name.split(".", 2)
                n_keep = n_kv[int(layer)] if role.startswith("attn") else n_ff[int(layer)]
                if not n_keep:
                    continue
                new = tuple(n * w for n in shapes(n_kv=n_kv[int(layer)])[role]) if role.startswith("attn") else None
                if new is None:
                    new = tuple(n_keep if n == N_FF * w else n for n in shape)
                blocks = new[-1] // grid.block_size * grid.block_bytes
                packed = packed[: new[0] if len(new) == 2 else 1, :blocks]
                shape = new
            tensors.append(TensorData(name, shape, grid, lambda p=packed: [p]))  # type: ignore[misc]
        write_gguf(path, self.fields(n_ff, n_kv), tensors)
        return path


def kept_for(grid: Grid, wide: int) -> Kept:
    """Different sizes in every layer; layer 1 without attention, layer 2 gone."""
    n = N_FF * wide
    third = n // 3
    return Kept(n_ff=(n, third, 0, 2 * third), n_kv=(2, 0, 0, 1))


@pytest.mark.parametrize("grid", [g for g in GRIDS.values() if g.name != "F64"], ids=lambda g: g.name)
def test_a_cut_in_every_grid_is_the_file_of_the_sliced_tensors(grid: Grid, tmp_path: Path) -> None:
    wide = max(1, grid.block_size // 32)  # then a third of the neurons and one kv group are whole blocks
    made = Made(grid, wide=wide)
    source, kept = made.write(tmp_path / "elastic.gguf"), kept_for(grid, wide)
    result = cut_gguf(source, tmp_path / "cut.gguf", kept)
    expected = made.write(tmp_path / "expected.gguf", kept).read_bytes()
    assert (tmp_path / "cut.gguf").read_bytes() == expected
    assert result.bytes == len(expected)
    assert cut_bytes(read_header(source), kept) == len(expected)


def test_nothing_cut_is_the_same_file(tmp_path: Path) -> None:
    source = Made(F16).write(tmp_path / "elastic.gguf")
    kept = Kept(n_ff=(N_FF,) * N_LAYERS, n_kv=(N_KV,) * N_LAYERS)
    assert cut_gguf(source, tmp_path / "cut.gguf", kept).removed_fraction == 0
    assert (tmp_path / "cut.gguf").read_bytes() == source.read_bytes()


@settings(max_examples=25)
@given(data=st.data())
def test_a_cut_of_a_cut_is_the_cut(data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("cuts")
    source = Made(GRIDS["Q8_0"], biases=False).write(folder / "elastic.gguf")
    first = [(data.draw(st.sampled_from((32, 64, 96))), data.draw(st.integers(1 if i == 0 else 0, 3))) for i in range(N_LAYERS)]
    second = [
        (data.draw(st.sampled_from(range(32, f + 1, 32))), data.draw(st.integers(min(1, k) if i == 0 else 0, k)))
        for i, (f, k) in enumerate(first)
    ]
    one, two = (Kept(n_ff=tuple(f for f, _ in sizes), n_kv=tuple(k for _, k in sizes)) for sizes in (first, second))
    cut_gguf(source, folder / "a.gguf", one)
    cut_gguf(folder / "a.gguf", folder / "b.gguf", two)
    cut_gguf(source, folder / "c.gguf", two)
    assert (folder / "b.gguf").read_bytes() == (folder / "c.gguf").read_bytes()


def test_pieces_are_smaller_than_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(GRIDS["Q4_0"])
    source, kept = made.write(tmp_path / "elastic.gguf"), kept_for(made.grid, 1)
    cut_gguf(source, tmp_path / "whole.gguf", kept)
    monkeypatch.setattr(cut_module, "CHUNK_BYTES", 100)
    steps: list[float] = []
    cut_gguf(source, tmp_path / "pieces.gguf", kept, progress=lambda step, done, total: steps.append(done))
    assert (tmp_path / "pieces.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert steps == sorted(steps)
    assert len(steps) > 200


def test_gguf_py_reads_a_cut(tmp_path: Path) -> None:
    made = Made(GRIDS["Q8_0"])
    kept = kept_for(made.grid, 1)
    cut_gguf(made.write(tmp_path / "elastic.gguf"), tmp_path / "cut.gguf", kept)
    reader = gguf.GGUFReader(tmp_path / "cut.gguf")
    assert reader.fields["deci.feed_forward_length"].contents() == list(kept.n_ff)
    assert reader.fields["deci.attention.head_count"].contents() == [4, 0, 0, 2]
    assert reader.fields["deci.attention.head_count_kv"].contents() == [2, 0, 0, 1]
    tensors = {t.name: t for t in reader.tensors}
    assert not [name for name in tensors if name.startswith(("blk.2.", "blk.1.attn"))]
    down = tensors["blk.3.ffn_down.weight"]
    assert down.shape.tolist() == [64, N_EMBD]
    assert np.array_equal(down.data, made.data["blk.3.ffn_down.weight"][2][:, : 2 * 34])


def test_the_size_label_follows_when_it_was_the_size(tmp_path: Path) -> None:
    made = Made(F16)
    kept = kept_for(F16, 1)
    n_values = sum(math.prod(shape) for shape, _, _ in made.data.values())
    source = made.write(tmp_path / "elastic.gguf")
    header = read_header(source)
    sliced = read_header(made.write(tmp_path / "expected.gguf", kept))
    cut_label = size_label(sum(math.prod(t.shape) for t in sliced.tensors.values()))
    assert cut_label != size_label(n_values)
    for label, expected in ((size_label(n_values), cut_label), ("135M", "135M")):
        fields = [*header.fields.values(), Field.string("general.size_label", label)]
        labelled = dataclasses.replace(header, fields={f.key: f for f in fields})
        plan = plan_cut(labelled, kept)
        assert {f.key: f.value for f in plan.fields}["general.size_label"] == expected


@given(st.integers(1, 10**13))
def test_size_labels_are_those_of_gguf_py(n: int) -> None:
    from gguf.utility import size_label as theirs

    assert size_label(n) == theirs(n, 0, 0, 0)


def test_the_removed_fraction_counts_parameters_of_blocks(tmp_path: Path) -> None:
    made = Made(F16)
    kept = kept_for(F16, 1)
    result = cut_gguf(made.write(tmp_path / "elastic.gguf"), tmp_path / "cut.gguf", kept)
    full = sum(math.prod(s) for s in shapes().values())
    layer_1 = sum(math.prod(s) for name, s in shapes(n_ff=32).items() if not name.startswith("attn"))
    left = sum(math.prod(s) for s in shapes(n_kv=2).values()) + layer_1 + sum(math.prod(s) for s in shapes(n_kv=1, n_ff=64).values())
    assert result.removed_fraction == pytest.approx(1 - left / (N_LAYERS * full))


# What comes besides prefixes


def test_biases_are_added_behind_their_weights_or_take_the_place_of_older_ones(tmp_path: Path) -> None:
    plain, kept = Made(F16, biases=False).write(tmp_path / "plain.gguf"), kept_for(F16, 1)
    values = np.arange(N_EMBD, dtype=np.float32)
    add = {"blk.0.ffn_down.bias": values, "blk.3.ffn_up.bias": values, "blk.0.attn_output.bias": -values}
    cut_gguf(plain, tmp_path / "cut.gguf", kept, extras=Extras(add=add))
    header = read_header(tmp_path / "cut.gguf")
    names = list(header.tensors)
    for name, expected in add.items():
        assert names[names.index(name) - 1] == name.replace("bias", "weight")
        found = header.tensors[name]
        assert (found.shape, found.grid) == (expected.shape, F32)
        assert np.array_equal(np.fromfile(tmp_path / "cut.gguf", np.float32, N_EMBD, offset=found.offset), expected)
    assert len(names) == len(plan_cut(read_header(plain), kept).tensors) + 3

    biased = Made(F16).write(tmp_path / "biased.gguf")
    plan = plan_cut(read_header(biased), kept, Extras(add={"blk.0.ffn_down.bias": values}))
    before = plan_cut(read_header(biased), kept)
    assert [t.layout for t in plan.tensors] == [t.layout for t in before.tensors]
    assert plan.removed_fraction == before.removed_fraction


def test_a_tensor_may_be_replaced_and_fields_set_and_dropped(tmp_path: Path) -> None:
    source = Made(GRIDS["Q8_0"]).write(tmp_path / "elastic.gguf")
    # 48 of 96 neurons are no whole Q8_0 blocks, but the replacement is F16.
    kept = Kept(n_ff=(48, 96, 96, 96), n_kv=(3, 3, 3, 3))
    new = np.arange(N_EMBD * 48, dtype=np.float16).reshape(N_EMBD, 48)

    def chunks() -> Iterator[np.ndarray]:
        for row in new:
            yield row.view(np.uint8)

    extras = Extras(
        replace={"blk.0.ffn_down.weight": Replacement(F16, chunks)},
        fields={"general.name": None, "edgeq.rate": Field.f32("edgeq.rate", 0.25), "deci.block_count": Field.u32("deci.block_count", 4)},
    )
    result = cut_gguf(source, tmp_path / "cut.gguf", kept, extras=extras)
    header = read_header(tmp_path / "cut.gguf")
    assert result.bytes == header.file_bytes == cut_bytes(read_header(source), kept, extras)
    down = header.tensors["blk.0.ffn_down.weight"]
    assert (down.shape, down.grid) == ((N_EMBD, 48), F16)
    assert np.array_equal(np.fromfile(tmp_path / "cut.gguf", np.float16, new.size, offset=down.offset), new.ravel())
    assert header.tensors["blk.0.ffn_gate.weight"].shape == (48, N_EMBD)
    assert "general.name" not in header.fields
    assert list(header.fields)[-1] == "edgeq.rate"
    assert list(header.fields)[1] == "deci.block_count"


# Refusals

FULL = {"n_ff": (N_FF,) * N_LAYERS, "n_kv": (N_KV,) * N_LAYERS}
BAD_KEPT: Mapping[str, tuple[Mapping[str, tuple[int, ...]], str]] = {
    "layers": ({"n_ff": (96, 96)}, r"neurons to keep are given for 2 layers, but elastic\.gguf has 4\. Give one number per layer\."),
    "more": ({"n_ff": (128, 96, 96, 96)}, r"layer 0: 128 neurons cannot be kept of 96\. Keep 0 to 96\."),
    "negative": ({"n_kv": (3, 3, -1, 3)}, r"layer 2: -1 kv heads cannot be kept of 3\. Keep 0 to 3\."),
    "first attention": ({"n_kv": (0, 3, 3, 3)}, r"layer 0: no kv heads are kept, but llama\.cpp reads the head size there\. Keep at least"),
    "last mlp": (
        {"n_ff": (96, 96, 96, 0), "n_kv": (3, 3, 3, 0)},
        r"layer 3: no neurons are kept in the last layer, where llama\.cpp picks",
    ),
    "attention alone": (
        {"n_ff": (96, 0, 96, 96)},
        r"layer 1: 3 kv heads are kept and no neurons, but llama\.cpp passes by a layer without",
    ),
    "columns": (
        {"n_ff": (96, 96, 40, 96)},
        r"blk\.2\.ffn_down\.weight: 40 of 96 columns do not divide into Q8_0 blocks of 32\. Keep 32 or 64\.",
    ),
}


@pytest.mark.parametrize("case", BAD_KEPT)
def test_what_cannot_be_kept_is_refused(case: str, tmp_path: Path) -> None:
    changes, message = BAD_KEPT[case]
    source = Made(GRIDS["Q8_0"]).write(tmp_path / "elastic.gguf")
    with pytest.raises(PlanError, match=message):
        cut_gguf(source, tmp_path / "cut.gguf", Kept(**{**FULL, **changes}))
    assert [p.name for p in tmp_path.iterdir()] == ["elastic.gguf"]


def test_kv_groups_are_whole_blocks(tmp_path: Path) -> None:
    header = read_header(Made(F16).write(tmp_path / "elastic.gguf"))
    name = "blk.1.attn_output.weight"  # 32 columns a group; in blocks of 64, an odd number of groups is no whole number of blocks
    coarse = dataclasses.replace(header.tensors[name], grid=GRIDS["Q2_0"])
    header = dataclasses.replace(header, tensors={**header.tensors, name: coarse})
    assert cut_bytes(header, Kept(n_ff=(96,) * 4, n_kv=(1, 2, 3, 1)))
    message = r"blk\.1\.attn_output\.weight: 32 of 96 columns do not divide into Q2_0 blocks of 64\. A kv head has 32 columns: keep another"
    with pytest.raises(PlanError, match=message):
        plan_cut(header, Kept(n_ff=(96,) * 4, n_kv=(3, 1, 3, 3)))


def test_extras_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    header, kept = read_header(Made(F16, biases=False).write(tmp_path / "elastic.gguf")), kept_for(F16, 1)
    values = np.zeros(N_EMBD, np.float32)
    for extras, message in (
        (
            Extras(add={"blk.1.attn_q.bias": values}),
            r"blk\.1\.attn_q\.bias: this cut of elastic\.gguf has no tensor that such a bias belongs",
        ),
        (
            Extras(add={"blk.0.ffn_down.weight": values}),
            r"blk\.0\.ffn_down\.weight: this cut of elastic\.gguf has no tensor that such a bias",
        ),
        (
            Extras(add={"blk.0.ffn_norm.bias": values}),
            r"blk\.0\.ffn_norm\.bias: llama\.cpp's deci architecture reads biases of attn_q, attn_k",
        ),
        (Extras(add={"blk.0.ffn_down.bias": values[1:]}), r"blk\.0\.ffn_down\.bias: \[63\] values are given, expected \[64\]"),
        (Extras(add={"blk.0.ffn_down.bias": values + np.nan}), r"blk\.0\.ffn_down\.bias: some values are not finite"),
        (
            Extras(replace={"blk.2.ffn_up.weight": Replacement(F16, list)}),
            r"blk\.2\.ffn_up\.weight: there is no such tensor in this cut of",
        ),
    ):
        with pytest.raises(PlanError, match=message):
            plan_cut(header, kept, extras)


def test_architectures_without_sizes_per_layer_are_cut_alike_in_every_layer(tmp_path: Path) -> None:
    made = Made(F16, arch="qwen3", biases=False)
    source = made.write(tmp_path / "elastic.gguf")
    kept = Kept(n_ff=(64,) * 4, n_kv=(2,) * 4)
    cut_gguf(source, tmp_path / "cut.gguf", kept)
    assert (tmp_path / "cut.gguf").read_bytes() == made.write(tmp_path / "expected.gguf", kept).read_bytes()
    for changes in ({"n_ff": (64, 64, 32, 64)}, {"n_ff": (0,) * 4}):
        message = r"neurons to keep are \[.*\]: llama\.cpp's qwen3 architecture has one number of neurons for all layers\. Keep the same"
        with pytest.raises(PlanError, match=message):
            plan_cut(read_header(source), Kept(**{**FULL, **changes}))


def test_other_files_are_refused(tmp_path: Path) -> None:
    kept = Kept(**FULL)
    llama = Made(F16, arch="llama").write(tmp_path / "llama.gguf")
    with pytest.raises(
        UnsupportedError, match=r"llama\.gguf: architecture 'llama' cannot be cut; deci, qwen3, gemma3, smollm3 can\. Export"
    ):
        cut_gguf(llama, tmp_path / "cut.gguf", kept)
    header = read_header(Made(F16).write(tmp_path / "elastic.gguf"))

    def changed(*fields: Field) -> Any:
        return dataclasses.replace(header, fields={**header.fields, **{f.key: f for f in fields}})

    for broken, error, message in (
        (changed(Field.u32("split.count", 2)), UnsupportedError, r"is one part of a split model\. Join the parts"),
        (changed(Field.u32("deci.block_count", 0)), SourceError, r"deci\.block_count is 0, expected a positive number"),
        (changed(Field.i32s("deci.attention.head_count_kv", [3, 3])), SourceError, r"head_count_kv is \[3, 3\], expected 4 numbers"),
        (
            changed(Field.i32s("deci.attention.head_count", [6, 6, 6, 5])),
            SourceError,
            r"layer 3 has 5 heads and 3 kv heads, which do not go",
        ),
        (changed(Field.i32s("deci.attention.head_count_kv", [3, 0, 3, 3])), SourceError, r"layer 1 has 6 heads and 0 kv heads"),
        (
            changed(Field.i32s("deci.feed_forward_length", [96, 96, 96, 128])),
            SourceError,
            r"blk\.3\.ffn_gate\.weight has shape \[96, 64\], but",
        ),
    ):
        with pytest.raises(error, match=message):
            plan_cut(broken, dataclasses.replace(kept, n_kv=(3, 0, 3, 3)) if "layer 1" in message else kept)
    info = header.tensors["blk.0.attn_q.weight"]
    for name in ("blk.0.attn_q.scale", "blk.0.attn_qkv.weight", "blk.7.attn_q.weight"):
        stray = dataclasses.replace(header, tensors={**header.tensors, name: dataclasses.replace(info, name=name)})
        with pytest.raises(SourceError, match=rf"tensor {name} is not one that an elastic export writes"):
            plan_cut(stray, kept)
    with pytest.raises(SourceError, match="cannot be read: No such file"):
        cut_gguf(tmp_path / "nothing.gguf", tmp_path / "cut.gguf", kept)


def test_the_output_is_never_the_input_and_never_overwritten_unasked(tmp_path: Path) -> None:
    source, kept = Made(F16).write(tmp_path / "elastic.gguf"), kept_for(F16, 1)
    before = source.read_bytes()
    (tmp_path / "link.gguf").symlink_to(source)
    for target in (source, tmp_path / "link.gguf"):
        with pytest.raises(OutputError, match="the output is the same file as an input"):
            cut_gguf(source, target, kept, force=True)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"kept")
    with pytest.raises(OutputError, match="exists and is kept"):
        cut_gguf(source, other, kept)
    assert (source.read_bytes(), other.read_bytes()) == (before, b"kept")
    cut_gguf(source, other, kept, force=True)
    assert other.stat().st_size == cut_bytes(read_header(source), kept)


def test_a_damaged_source_gives_nothing(tmp_path: Path) -> None:
    source, kept = Made(F16).write(tmp_path / "elastic.gguf"), kept_for(F16, 1)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    cut_gguf(source, tmp_path / "good.gguf", kept, sha256=digest)
    data = bytearray(source.read_bytes())
    data[-70] ^= 1
    source.write_bytes(data)
    for run in (lambda: cut_gguf(source, tmp_path / "bad.gguf", kept, sha256=digest), lambda: cut_to_memory(source, kept, sha256=digest)):
        with pytest.raises(
            PackageError, match=rf"elastic\.gguf does not match its hash \(\w+, the package says {digest[:12]}\): it is damaged"
        ):
            run()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elastic.gguf", "good.gguf"]


def test_no_room_is_said_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, kept = Made(F16).write(tmp_path / "elastic.gguf"), kept_for(F16, 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(OutputError, match=r"cut\.gguf: needs [\d,]+ bytes, but only 10 are free on that disk"):
        cut_gguf(source, tmp_path / "cut.gguf", kept)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 10})())
    with pytest.raises(OutputError, match=r"a cut in memory needs [\d,]+ bytes, 10 are free\. Choose a higher rate, or cut to a file"):
        cut_to_memory(source, kept)
    assert [p.name for p in tmp_path.iterdir()] == ["elastic.gguf"]


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits")
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    """The limit on file size stands in for a full disk: the write itself fails, long after the free space was looked up."""
    source = Made(F16).write(tmp_path / "elastic.gguf")
    script = f"""
import resource, signal
from pathlib import Path
from edgeq.elastic import Kept
from edgeq.errors import OutputError
from edgeq.runtime.cut import cut_gguf
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    cut_gguf(Path({str(source)!r}), Path({str(tmp_path / "cut.gguf")!r}), Kept(n_ff=(96,) * 4, n_kv=(3,) * 4))
except OutputError as err:
    print(err)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "writing stopped after 50000 of" in run.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["elastic.gguf"]


def test_a_source_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    source, kept = Made(F16).write(tmp_path / "elastic.gguf"), kept_for(F16, 1)

    def shrink(step: str, done: float, total: float) -> None:
        os.truncate(source, 20_000)

    with pytest.raises(SourceError, match=r"elastic\.gguf: ended at byte 20000 while it was read\. Copy the file again\."):
        cut_gguf(source, tmp_path / "cut.gguf", kept, progress=shrink)
    assert [p.name for p in tmp_path.iterdir()] == ["elastic.gguf"]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("at", [0, 3, 20, 40, -1])
def test_a_kill_leaves_nothing_under_the_final_name(at: int, tmp_path: Path) -> None:
    """Killed behind the n-th piece written; -1: behind the last, before the rename."""
    source = Made(F16).write(tmp_path / "elastic.gguf")
    target = tmp_path / "cut.gguf"
    script = f"""
import os, signal
from pathlib import Path
from edgeq.elastic import Kept
from edgeq.runtime.cut import cut_gguf
calls = 0
def kill(step, done, total):
    global calls
    calls += 1
    if calls > {at} >= 0 or done == total and {at} < 0:
        os.kill(os.getpid(), signal.SIGKILL)
cut_gguf(Path({str(source)!r}), Path({str(target)!r}), Kept(n_ff=(96, 32, 0, 64), n_kv=(2, 0, 0, 1)), progress=kill)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert not target.exists()
    assert len(list(tmp_path.iterdir())) == 2  # a hidden sibling, which the next run removes
    cut_gguf(source, target, kept_for(F16, 1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.gguf", "elastic.gguf"]


# In memory


def test_a_cut_in_memory_has_the_bytes_of_a_cut_on_disk(tmp_path: Path) -> None:
    source, kept = Made(GRIDS["Q4_0"]).write(tmp_path / "elastic.gguf"), kept_for(GRIDS["Q4_0"], 1)
    on_disk = cut_gguf(source, tmp_path / "cut.gguf", kept)
    with cut_to_memory(source, kept) as small:
        assert small.result == on_disk
        assert small.path.read_bytes() == (tmp_path / "cut.gguf").read_bytes()
        child = subprocess.run(
            [sys.executable, "-c", f"print(len(open({str(small.path)!r}, 'rb').read()))"], capture_output=True, check=True
        )
        assert int(child.stdout) == on_disk.bytes
    assert not small.path.exists()
    small.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.gguf", "elastic.gguf"]


def test_without_memory_files_there_is_a_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, kept = Made(F16).write(tmp_path / "elastic.gguf"), kept_for(F16, 1)
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    small = cut_to_memory(source, kept)
    assert small.path.parent.name == "temporary"
    assert small.path.stat().st_size == small.result.bytes
    small.close()
    with pytest.raises(PackageError):
        cut_to_memory(source, kept, sha256="0" * 64)
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A 2 GB file whose data is a hole: the peak stays within 150 MiB of an interpreter with numpy, hashing and all."""
    n_embd, n_ff, n_layers, n_vocab = 2048, 8192, 30, 128256
    shapes = {"token_embd.weight": (n_vocab, n_embd), "output_norm.weight": (n_embd,)}
    for i in range(n_layers):
        shapes |= {f"blk.{i}.attn_{r}.weight": (n_embd, n_embd) for r in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{r}.weight": (n_ff, n_embd) for r in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down.weight": (n_embd, n_ff)}
    layouts = [TensorLayout(name, shape, GRIDS["Q8_0"] if len(shape) == 2 else F32) for name, shape in shapes.items()]
    sizes = {"feed_forward_length": n_ff, "attention.head_count": 32, "attention.head_count_kv": 32}
    fields = [
        Field.string("general.architecture", "deci"),
        Field.u32("deci.block_count", n_layers),
        Field.u32("deci.attention.key_length", 64),
        *(Field.i32s(f"deci.{key}", [n] * n_layers) for key, n in sizes.items()),
    ]
    source, nbytes = tmp_path / "elastic.gguf", predicted_bytes(fields, layouts)
    source.write_bytes(header_bytes(fields, layouts))
    os.truncate(source, nbytes)
    assert nbytes > 2e9
    status = "print(next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    script = f"""
from pathlib import Path
from edgeq.elastic import Kept
from edgeq.errors import PackageError
from edgeq.runtime.cut import cut_gguf
try:
    cut_gguf(Path({str(source)!r}), Path({str(tmp_path / "cut.gguf")!r}), Kept(n_ff=(4096,) * 30, n_kv=(16,) * 30), sha256="0" * 64)
except PackageError:
    {status}
"""
    bare, peak = (
        int(subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout)
        for text in (f"import numpy\n{status}", script)
    )
    assert (peak - bare) / 1024 < 150
