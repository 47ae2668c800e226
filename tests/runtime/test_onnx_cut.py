"""Cuts of ONNX folders: the same bytes as a fresh export of the smaller model, in every family and grid; what is refused; crashes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx_folders import copy_of, edit_graph
from tiny import hf_folder
from tiny_elastic_onnx import QUANTS, model_of, session_logits, write_model

from edgeq import ports
from edgeq.converters.onnx.lowering import Turning
from edgeq.elastic import Kept
from edgeq.errors import OutputError, PackageError, PlanError, SourceError, UnsupportedError
from edgeq.model import Model
from edgeq.reference import Reference
from edgeq.runtime import onnx_cut
from edgeq.runtime.onnx_cut import Hashes, cut_onnx, cut_onnx_to_memory
from edgeq.runtime.onnx_cut_plan import plan_onnx_cut
from edgeq.runtime.onnx_file import read_onnx
from edgeq.runtime.onnx_sizes import read_sizes

FAMILIES = ("llama", "qwen2-tied", "qwen3", "phi3-longrope", "gemma3", "smollm3")
FILES = ("genai_config.json", "model.onnx", "model.onnx.data")
IDS = [3, 17, 250, 99, 4, 4, 31]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in made:
            made[name] = model_of(hf_folder(tmp_path_factory.mktemp("sources") / name, name))
        return made[name]

    return get


@pytest.fixture(scope="module")
def llama(models: Callable[[str], Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("folders") / "llama"
    write_model(models("llama"), folder)
    return folder


def unequal(model: Model, *, groups: bool = True) -> Kept:
    """Other sizes in every layer."""
    n_kv = tuple(b.n_kv_heads - int(groups and i % 2) for i, b in enumerate(model.spec.attention))
    return Kept(n_ff=tuple(b.n_ff - 32 * (1 + i % 3) for i, b in enumerate(model.spec.mlps)), n_kv=n_kv)


def sliced(model: Model, kept: Kept) -> Model:
    spec, tensors = ports.cut(model.spec, model.tensors, kept)
    return replace(model, spec=spec, tensors=tensors)


def same_files(a: Path, b: Path) -> list[str]:
    return [name for name in FILES if (a / name).read_bytes() != (b / name).read_bytes()]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cut_computes_what_is_left_of_the_model(models: Callable[[str], Model], tmp_path: Path, name: str) -> None:
    """In float32, against the reference on sliced weights; layers have sizes of their own, which GGUF has for two families only."""
    model = models(name)
    kept = unequal(model)
    write_model(model, tmp_path / "whole")
    result = cut_onnx(tmp_path / "whole", tmp_path / "cut", kept)
    small = sliced(model, kept)
    reference = Reference(small.spec, small.tensors)
    expected = reference.logits(reference.hidden([IDS], n_ctx=small.spec.n_ctx)[0]).numpy()
    found = session_logits(tmp_path / "cut", IDS)
    assert np.abs(found - expected).max() <= 1e-4
    assert np.abs(session_logits(tmp_path / "whole", IDS) - found).max() > 1e-2  # something did go
    assert result.bytes == sum((tmp_path / "cut" / file).stat().st_size for file in ("model.onnx", "model.onnx.data"))


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_cut_is_a_fresh_export_of_the_sliced_model(models: Callable[[str], Model], tmp_path: Path, name: str, quant: str) -> None:
    model, group = models(name), models(name).spec.attention[0]
    width = group.n_heads // group.n_kv_heads * group.head_dim
    kept = unequal(model, groups=quant.startswith("fp") or width % 32 == 0)
    write_model(model, tmp_path / "whole", quant, join=True)
    cut_onnx(tmp_path / "whole", tmp_path / "cut", kept)
    write_model(sliced(model, kept), tmp_path / "fresh", quant, join=True)
    assert same_files(tmp_path / "cut", tmp_path / "fresh") == []


@pytest.mark.parametrize("quant", ["fp32", "int8-asym"])
def test_matrices_that_are_not_joined_are_cut_as_well(models: Callable[[str], Model], tmp_path: Path, quant: str) -> None:
    model = models("llama")
    kept = unequal(model, groups=quant == "fp32")
    write_model(model, tmp_path / "whole", quant)
    cut_onnx(tmp_path / "whole", tmp_path / "cut", kept)
    write_model(sliced(model, kept), tmp_path / "fresh", quant)
    assert same_files(tmp_path / "cut", tmp_path / "fresh") == []


def test_kv_heads_keep_rope_pairs_of_their_own(models: Callable[[str], Model], tmp_path: Path) -> None:
    """Lists of pairs, by KV head, lose those of the heads that go."""
    model = models("llama")
    pairs = tuple(range(12))
    turnings = {0: Turning(model.spec.rope, (pairs, pairs[::-1])), 1: Turning(model.spec.rope, (pairs[::-1], pairs))}
    first = {layer: Turning(turning.rope, turning.pairs[:1]) for layer, turning in turnings.items()}
    kept = Kept(n_ff=(160, 160), n_kv=(1, 1))
    write_model(model, tmp_path / "whole", turnings=turnings)
    cut_onnx(tmp_path / "whole", tmp_path / "cut", kept)
    write_model(sliced(model, kept), tmp_path / "fresh", turnings=first)
    expected = session_logits(tmp_path / "fresh", IDS)
    assert np.abs(session_logits(tmp_path / "cut", IDS) - expected).max() <= 1e-5  # one head turns like all: other operators


def test_a_cut_of_a_cut_is_the_cut_one_would_have_made(llama: Path, tmp_path: Path) -> None:
    first, second = Kept(n_ff=(128, 160), n_kv=(2, 2)), Kept(n_ff=(64, 96), n_kv=(1, 2))
    cut_onnx(llama, tmp_path / "first", first)
    cut_onnx(tmp_path / "first", tmp_path / "twice", second)
    cut_onnx(llama, tmp_path / "once", second)
    assert same_files(tmp_path / "twice", tmp_path / "once") == []


def test_nothing_to_cut_is_a_copy(llama: Path, tmp_path: Path) -> None:
    cut_onnx(llama, tmp_path / "cut", read_sizes(read_onnx(llama / "model.onnx")).whole)
    assert same_files(tmp_path / "cut", llama) == []


def test_the_config_has_the_sizes_of_the_first_layer(llama: Path, tmp_path: Path) -> None:
    cut_onnx(llama, tmp_path / "cut", Kept(n_ff=(160, 160), n_kv=(1, 2)))
    decoder = json.loads((tmp_path / "cut" / "genai_config.json").read_text())["model"]["decoder"]
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"], decoder["head_size"]) == (2, 1, 24)


def test_onnxruntime_genai_runs_a_cut(llama: Path, tmp_path: Path) -> None:
    from onnx_folders import genai_tokens

    cut_onnx(llama, tmp_path / "cut", Kept(n_ff=(128, 96), n_kv=(2, 1)))
    ids = list(IDS)
    while len(ids) < len(IDS) + 6:
        ids.append(int(session_logits(tmp_path / "cut", ids)[-1].argmax()))
    found = genai_tokens(tmp_path / "cut", IDS, 6)
    assert found == ids[len(IDS) : len(IDS) + len(found)] and found


def test_a_cut_in_memory_is_gone_when_it_is_closed(llama: Path, tmp_path: Path) -> None:
    kept = Kept(n_ff=(128, 96), n_kv=(2, 1))
    cut_onnx(llama, tmp_path / "cut", kept)
    with cut_onnx_to_memory(read_onnx(llama / "model.onnx"), kept) as held:
        folder = held.path.parent
        assert same_files(folder, tmp_path / "cut") == []
        loaded = ort.InferenceSession(held.path, providers=["CPUExecutionProvider"])
    assert not folder.exists()
    assert loaded.get_inputs()


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (Kept(n_ff=(160,), n_kv=(2, 2)), "neurons to keep are given for 1 layers, but model.onnx has 2"),
        (Kept(n_ff=(160, 192), n_kv=(2, 2)), "layer 1: 192 neurons cannot be kept of 160. Keep 1 to 160"),
        (Kept(n_ff=(160, 160), n_kv=(0, 2)), "layer 0: 0 kv heads cannot be kept of 2. Keep 1 to 2: a graph keeps every layer"),
        (Kept(n_ff=(160, 160), n_kv=(2, 2), head_dim=16), "heads cannot be cut to 16 dimensions in model.onnx. Keep all 24"),
        (Kept(n_ff=(160, 160), n_kv=(2, 2), head_dims=(24, 8)), "heads cannot be cut to 8 dimensions in model.onnx. Keep all 24"),
    ],
)
def test_sizes_that_cannot_be_are_refused(llama: Path, tmp_path: Path, kept: Kept, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        cut_onnx(llama, tmp_path / "cut", kept)
    assert list(tmp_path.iterdir()) == []


def test_blocks_are_not_cut_through(models: Callable[[str], Model], tmp_path: Path) -> None:
    write_model(models("llama"), tmp_path / "whole", "int4")
    file = read_onnx(tmp_path / "whole" / "model.onnx")
    with pytest.raises(PlanError, match=r"mlp.down_proj: 100 of 160 columns do not divide into blocks of 32. Keep 96 or 128."):
        plan_onnx_cut(file, Kept(n_ff=(100, 160), n_kv=(2, 2)))
    with pytest.raises(PlanError, match=r"self_attn.o_proj: 48 of 96 columns .* A kv head has 48 columns: keep another number of kv heads"):
        plan_onnx_cut(file, Kept(n_ff=(160, 160), n_kv=(1, 2)))


def test_foreign_graphs_are_refused(models: Callable[[str], Model], tmp_path: Path) -> None:
    kept = Kept(n_ff=(128, 160), n_kv=(2, 2))
    whole = tmp_path / "whole"
    write_model(models("llama"), whole, "int8", join=True)

    def refused(change: Callable[[onnx.ModelProto], object], kind: type[Exception], message: str) -> None:
        folder = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        copy_of(whole, folder)
        edit_graph(folder, change)
        with pytest.raises(kind, match=message):
            plan_onnx_cut(read_onnx(folder / "model.onnx"), kept)

    def node(graph: onnx.GraphProto, part: str) -> onnx.NodeProto:
        return next(node for node in graph.node if part in node.name)

    def rename(proto: onnx.ModelProto) -> None:
        for part in (*proto.graph.initializer, *proto.graph.node):
            part.name = part.name.replace("down_proj", "c_proj")
        for made in proto.graph.node:
            made.input[:] = [name.replace("down_proj.", "c_proj.") for name in made.input]

    refused(rename, UnsupportedError, "cannot be cut, because layer 0 has no down_proj. Export the model with --elastic")
    refused(lambda p: setattr(node(p.graph, "act_fn/Sigmoid"), "op_type", "Mish"), UnsupportedError, r"operator Mish \(/model/layers.0/mlp")
    refused(lambda p: setattr(node(p.graph, "gate_up_proj/Split"), "name", "x"), UnsupportedError, "x is no split that edgeq cuts")

    def widen(proto: onnx.ModelProto) -> None:
        for value in proto.graph.input:
            if value.name == "past_key_values.0.value":
                value.type.tensor_type.shape.dim[3].dim_value = 25

    refused(widen, UnsupportedError, r"layer 0 has keys of .* and values of .*, which edgeq does not cut")

    def more_heads(proto: onnx.ModelProto) -> None:
        for value in proto.graph.input:
            if value.name.startswith("past_key_values.0."):
                value.type.tensor_type.shape.dim[1].dim_value = 4

    refused(more_heads, SourceError, "qkv_proj has 192 outputs and 64 inputs, where 288 and 64 go with the rest of its layer")


def test_damage_is_found_by_the_hashes(llama: Path, tmp_path: Path) -> None:
    from edgeq.package import sha256

    kept = Kept(n_ff=(128, 160), n_kv=(2, 2))
    hashes = Hashes(
        files={name: sha256(llama / name) for name in ("model.onnx", "genai_config.json")}, data=sha256(llama / "model.onnx.data")
    )
    cut_onnx(llama, tmp_path / "fine", kept, hashes=hashes)
    for name in FILES:
        folder = tmp_path / name
        cut_onnx(llama, folder, read_sizes(read_onnx(llama / "model.onnx")).whole)
        content = bytearray((folder / name).read_bytes())
        at = content.index(b"decoder") if name != "model.onnx.data" else len(content) // 2
        content[at] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(PackageError, match=f"{name} does not match its hash .*: it is damaged. Copy the package again"):
            cut_onnx(folder, tmp_path / "cut", kept, hashes=hashes)
        assert not (tmp_path / "cut").exists()


def test_cut_short_data_is_found(llama: Path, tmp_path: Path) -> None:
    cut_onnx(llama, tmp_path / "copy", read_sizes(read_onnx(llama / "model.onnx")).whole)
    file = read_onnx(tmp_path / "copy" / "model.onnx")
    os.truncate(tmp_path / "copy" / "model.onnx.data", 1000)
    with pytest.raises(SourceError, match=r"model.onnx.data: ended at byte \d+ while it was read"):
        cut_onnx(file, tmp_path / "cut", Kept(n_ff=(128, 160), n_kv=(2, 2)))
    assert not (tmp_path / "cut").exists()


def test_an_existing_folder_is_kept_unless_forced(llama: Path, tmp_path: Path) -> None:
    kept = Kept(n_ff=(128, 160), n_kv=(2, 2))
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "note").write_text("mine")
    with pytest.raises(OutputError, match="exists and is kept"):
        cut_onnx(llama, tmp_path / "cut", kept)
    assert (tmp_path / "cut" / "note").read_text() == "mine"
    cut_onnx(llama, tmp_path / "cut", kept, force=True)
    assert not (tmp_path / "cut" / "note").exists()
    with pytest.raises(OutputError, match="would replace the input"):
        cut_onnx(llama, llama, kept, force=True)


def test_a_full_disk_leaves_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeq.gguf_write import OutputFile

    def full(self: OutputFile, data: bytes) -> None:
        self.fail(OSError(errno.ENOSPC, "No space left on device"))

    kept = Kept(n_ff=(128, 160), n_kv=(2, 2))
    with monkeypatch.context() as patch:
        patch.setattr(OutputFile, "write", full)
        with pytest.raises(OutputError, match=r"writing stopped after 0 of \d+ bytes: No space left"):
            cut_onnx(llama, tmp_path / "cut", kept)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(OutputError, match="but only 1,000 are free"):
        cut_onnx(llama, tmp_path / "cut", kept)
    with pytest.raises(OutputError, match=r"a temporary cut needs [\d,]+ bytes, 1,000 are free"):
        cut_onnx_to_memory(read_onnx(llama / "model.onnx"), kept)


_SLOW = """
import sys, time
from pathlib import Path
from edgeq.elastic import Kept
from edgeq.runtime import onnx_cut
real = onnx_cut.read_pieces
def slow(*arguments):
    for piece in real(*arguments):
        print("piece", flush=True)
        time.sleep(0.05)
        yield piece
onnx_cut.read_pieces = slow
onnx_cut.cut_onnx(Path(sys.argv[1]), Path(sys.argv[2]), Kept(n_ff=(128, 96), n_kv=(2, 1)))
"""


@pytest.mark.parametrize("pieces", [1, 8])
def test_a_kill_leaves_no_folder_under_the_final_name(llama: Path, tmp_path: Path, pieces: int) -> None:
    target = tmp_path / "cut"
    process = subprocess.Popen([sys.executable, "-c", _SLOW, str(llama), str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(pieces):
        assert process.stdout.readline() == "piece\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not target.exists()
    cut_onnx(llama, target, Kept(n_ff=(128, 96), n_kv=(2, 1)))  # and the next one sweeps up what is left
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


def test_weights_to_replace_must_be_there(llama: Path, tmp_path: Path) -> None:
    extras = onnx_cut.OnnxExtras(replace={"nothing": list})
    with pytest.raises(PlanError, match=r"nothing: there is no such weight in .*model.onnx to replace"):
        cut_onnx(llama, tmp_path / "cut", Kept(n_ff=(128, 160), n_kv=(2, 2)), extras=extras)
