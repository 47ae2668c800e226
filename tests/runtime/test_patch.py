from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_gguf import write_tiny_gguf

from edgeq.errors import AdapterError, OutputError, RuntimeFailure, UsageError
from edgeq.gguf_file import read_header
from edgeq.patch_file import Sparse, read_patch, write_patch
from edgeq.runtime import patch as module
from edgeq.runtime.llama import LlamaModel
from edgeq.runtime.patch import Patches, Weights
from edgeq.runtime.session import Session, load

PROMPT = "the quick brown fox jumps over the lazy dog"
UP, DOWN, NORM = "blk.0.ffn_up.weight", "blk.1.ffn_down.weight", "blk.1.ffn_norm.weight"


def half_precision(path: Path, target: Path) -> Path:
    """The same model with matrices in F16, written by gguf-py."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            item_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=item_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data.astype(np.float16) if tensor.data.ndim == 2 else tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture(scope="module", params=["F32", "F16"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patch")
    path = write_tiny_gguf(folder / "tiny.gguf")
    return path if request.param == "F32" else half_precision(path, folder / "half.gguf")


@pytest.fixture
def session(base: Path) -> Iterator[Session]:
    with load(base, n_ctx=256, threads=1, patchable=True) as session:
        yield session


def deltas(base: Path, *names: str, seed: int = 0, fraction: float = 0.2, part: slice = slice(None)) -> dict[str, Sparse]:
    """Random changes to a part of the places of some tensors, in no order."""
    rng = np.random.default_rng(seed)
    header, found = read_header(base), {}
    for name in names:
        places = rng.permutation(np.arange(np.prod(header.tensors[name].shape))[part])
        indices = places[: max(1, int(fraction * len(places)))]
        found[name] = indices, rng.standard_normal(len(indices)).astype(np.float32)
    return found


def patched_copy(base: Path, target: Path, *changes: dict[str, Sparse], scale: float = 1.0) -> Path:
    """The file that a patch should come to: sums in float32, rounded to the tensor's type."""
    shutil.copyfile(base, target)
    for tensor in gguf.GGUFReader(target, "r+").tensors:
        for sparse in changes:
            if tensor.name in sparse:
                indices, values = sparse[tensor.name]
                flat = tensor.data.reshape(-1)
                flat[indices] = (flat[indices].astype(np.float32) + np.float32(scale) * values).astype(flat.dtype)
    return target


def hashes(model: LlamaModel) -> dict[str, str]:
    """SHA-256 of every tensor in llama.cpp's memory."""
    weights = Weights(model)
    return {name: hashlib.sha256(weights[name].tobytes()).hexdigest() for name in model.facts.tensors}


def file_hashes(path: Path) -> dict[str, str]:
    return {tensor.name: hashlib.sha256(tensor.data.tobytes()).hexdigest() for tensor in gguf.GGUFReader(path).tensors}


def test_apply_equals_a_patched_file_and_undo_the_base(session: Session, base: Path, tmp_path: Path) -> None:
    changes = deltas(base, UP, DOWN, NORM)
    path = write_patch(tmp_path / "sql.eqpatch", changes, read_header(base))
    before = session.generate(PROMPT, max_tokens=12)
    assert hashes(session.model) == file_hashes(base)
    assert session.apply_patch(path, scale=0.5) == "sql"
    assert session.patches == ("sql",)
    expected = patched_copy(base, tmp_path / "expected.gguf", changes, scale=0.5)
    assert hashes(session.model) == file_hashes(expected)
    after = session.generate(PROMPT, max_tokens=12)
    assert after.timings.reused_tokens == 0, "what is cached was computed by other weights"
    with load(expected, n_ctx=256, threads=1) as other:
        assert other.generate(PROMPT, max_tokens=12).tokens == after.tokens != before.tokens
    session.undo_patch("sql")
    assert session.patches == ()
    assert hashes(session.model) == file_hashes(base)
    again = session.generate(PROMPT, max_tokens=12)
    assert again.timings.reused_tokens == 0
    assert again.tokens == before.tokens


def test_disjoint_patches_commute_and_go_in_any_order(session: Session, base: Path, tmp_path: Path) -> None:
    changes = {name: deltas(base, UP, NORM, seed=i, part=slice(i, None, 3)) for i, name in enumerate("abc")}
    paths = {name: write_patch(tmp_path / f"{name}.eqpatch", change, read_header(base)) for name, change in changes.items()}
    everything = file_hashes(patched_copy(base, tmp_path / "all.gguf", *changes.values()))
    without_b = file_hashes(patched_copy(base, tmp_path / "ac.gguf", changes["a"], changes["c"]))
    for order in ("abc", "cba", "bca"):
        for name in order:
            session.apply_patch(paths[name])
        assert hashes(session.model) == everything
        session.undo_patch("b")
        assert hashes(session.model) == without_b
        session.undo_patch(order.replace("b", "")[0])
        session.undo_patch(order.replace("b", "")[1])
        assert hashes(session.model) == file_hashes(base)


def test_overlapping_patches_are_refused(session: Session, base: Path, tmp_path: Path) -> None:
    """Also where the first changes a value by nothing, which no comparison of values would find."""
    size = read_header(base).tensors[UP].shape[0] * 64
    first = write_patch(tmp_path / "first.eqpatch", {UP: (np.array([3, 7, size - 1]), np.array([0.0, 1.0, 1.0]))}, read_header(base))
    for name, indices, shared in (("x", [0, 3, 4], 1), ("y", [3, 7, size - 1], 3)):
        path = write_patch(
            tmp_path / f"{name}.eqpatch", {UP: (np.array(indices), np.ones(3)), NORM: (np.array([0]), np.ones(1))}, read_header(base)
        )
        session.apply_patch(first)
        applied = hashes(session.model)
        message = (
            f"{name}.eqpatch: changes {shared} values of {UP} that patch 'first' changes too. Undo 'first' first, or merge both into one"
        )
        with pytest.raises(AdapterError, match=re.escape(message)):
            session.apply_patch(path)
        assert hashes(session.model) == applied, "applied whole or not at all"
        session.undo_patch("first")
        session.apply_patch(path)
        session.undo_patch(name)


def test_names_and_scales(session: Session, base: Path, tmp_path: Path) -> None:
    path = write_patch(tmp_path / "sql.eqpatch", deltas(base, UP), read_header(base))
    with pytest.raises(UsageError, match=r"no patch named 'sql' is applied; none is applied"):
        session.undo_patch("sql")
    assert session.apply_patch(path, "x") == "x"
    with pytest.raises(UsageError, match=r"a patch named 'x' is applied already. Undo it or choose another name."):
        session.apply_patch(path, "x")
    with pytest.raises(UsageError, match=r"no patch named 'sql' is applied; applied are 'x'"):
        session.undo_patch("sql")
    with pytest.raises(UsageError, match=r"the scale of patch 'y' is inf; expected a finite number"):
        session.apply_patch(path, "y", scale=float("inf"))


def test_another_base_is_refused(session: Session, base: Path, tmp_path: Path) -> None:
    other = patched_copy(base, tmp_path / "other.gguf", {DOWN: (np.array([5]), np.array([0.25]))})
    path = write_patch(
        tmp_path / "sql.eqpatch", {UP: (np.array([1]), np.ones(1)), DOWN: (np.array([4, 5]), np.ones(2))}, read_header(other)
    )
    with pytest.raises(AdapterError, match=rf"the values of {DOWN} that it changes are not those it was made for. Use the artifact that"):
        session.apply_patch(path)
    assert hashes(session.model) == file_hashes(base)
    larger = write_tiny_gguf(tmp_path / "larger.gguf", head_dim=32, n_layers=3)
    path = write_patch(tmp_path / "q.eqpatch", {"blk.0.attn_q.weight": (np.array([1]), np.ones(1))}, read_header(larger))
    grid = read_header(base).tensors["blk.0.attn_q.weight"].grid.name
    message = f"was made for blk.0.attn_q.weight as F32 [128, 64], in {base.name} it is {grid} [96, 64]. Use the artifact"
    with pytest.raises(AdapterError, match=re.escape(message)):
        session.apply_patch(path)
    path = write_patch(tmp_path / "l.eqpatch", {"blk.2.attn_q.weight": (np.array([1]), np.ones(1))}, read_header(larger))
    with pytest.raises(AdapterError, match=rf"l.eqpatch: {base.name} has no tensor blk.2.attn_q.weight. Use the artifact"):
        session.apply_patch(path)


def test_sums_beyond_the_range_are_refused(session: Session, base: Path, tmp_path: Path) -> None:
    grid = read_header(base).tensors[UP].grid.name
    path = write_patch(tmp_path / "big.eqpatch", {UP: (np.array([1]), np.array([2e38 if grid == "F32" else 4e4]))}, read_header(base))
    with pytest.raises(AdapterError, match=rf"values of {UP} would leave the range of {grid}. Use a smaller scale."):
        session.apply_patch(path, scale=2.0)
    assert hashes(session.model) == file_hashes(base)


def test_models_whose_weights_cannot_change(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_patch(tmp_path / "sql.eqpatch", deltas(base, UP), read_header(base))
    with (
        load(base, n_ctx=256, threads=1) as mapped,
        pytest.raises(UsageError, match=r"mapped from the file and cannot change. Open the"),
    ):
        mapped.apply_patch(path)
    with LlamaModel.load(base, use_mmap=False) as model:
        patches = Patches(model)
        patches.apply(read_patch(path))
    with pytest.raises(RuntimeFailure, match="the model is closed"):
        patches.undo("sql")
    with LlamaModel.load(base, use_mmap=False) as model:
        model.gpu_layers = 1
        with pytest.raises(UsageError, match=r"is on a GPU; patches are applied in CPU memory only. Open the session on the CPU."):
            Patches(model)
        model.gpu_layers = 0
        monkeypatch.setattr(module, "_GET_TENSOR", "?get_tensor@llama_model@@")  # as another compiler would name it
        with pytest.raises(
            RuntimeFailure, match=r"this build of llama.cpp does not let its weights be found, so patches cannot be applied."
        ):
            Patches(model)


def test_quantized_tensors_are_refused_with_the_reason(tmp_path: Path) -> None:
    packed = gguf.quantize(np.ones((160, 64), dtype=np.float32), gguf.GGMLQuantizationType.Q4_0)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_tensor(UP, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = (
        f"{UP} is Q4_0, whose values come in blocks of 32 with a common scale; only F16 and F32 tensors can be patched in place. Merge"
    )
    with pytest.raises(AdapterError, match=re.escape(message)):
        write_patch(tmp_path / "q.eqpatch", {UP: (np.array([1]), np.ones(1))}, read_header(tmp_path / "q.gguf"))


@pytest.mark.parametrize(
    ("sparse", "message"),
    [
        ({"blk.9.x": ([1], [1.0])}, "tiny.gguf has no tensor blk.9.x to patch"),
        ({UP: ([160 * 64], [1.0])}, f"places 10240 to 10240 of {UP} were given, it has 10240 values"),
        ({UP: ([-1, 2], [1.0, 1.0])}, f"places -1 to 2 of {UP} were given"),
        ({UP: ([2, 2], [1.0, 1.0])}, f"places in {UP} repeat or are not in order"),
        ({UP: ([2], [np.nan])}, f"values for {UP} are not finite"),
        ({UP: ([], [])}, "the patch would change nothing"),
        ({}, "the patch would change nothing"),
    ],
)
def test_patches_that_cannot_be_written(tmp_path: Path, sparse: dict[str, Any], message: str) -> None:
    base = write_tiny_gguf(tmp_path / "tiny.gguf")
    arrays = {name: (np.array(indices, dtype=np.int64), np.array(values)) for name, (indices, values) in sparse.items()}
    with pytest.raises(AdapterError, match=re.escape(message)):
        write_patch(tmp_path / "x.eqpatch", arrays, read_header(base))
    assert list(tmp_path.iterdir()) == [base]


def test_written_bytes_depend_on_content_alone(tmp_path: Path) -> None:
    base = write_tiny_gguf(tmp_path / "tiny.gguf")
    changes = deltas(base, UP, NORM)
    first = write_patch(tmp_path / "a.eqpatch", changes, read_header(base)).read_bytes()
    order = np.argsort(changes[UP][0])
    changes = {NORM: changes[NORM], UP: (changes[UP][0][order], changes[UP][1][order])}
    assert write_patch(tmp_path / "b.eqpatch", changes, read_header(base)).read_bytes() == first
    patch = read_patch(tmp_path / "a.eqpatch")
    assert patch.n_values == sum(len(indices) for indices, _ in changes.values())
    for tensor in patch.tensors:
        indices, values = changes[tensor.name]
        order = np.argsort(indices)
        np.testing.assert_array_equal(tensor.indices, indices[order])
        np.testing.assert_array_equal(tensor.values, values[order])
    with pytest.raises(OutputError):
        write_patch(tmp_path / "a.eqpatch", changes, read_header(base))


def test_damaged_patches(tmp_path: Path) -> None:
    base = write_tiny_gguf(tmp_path / "tiny.gguf")
    path = write_patch(tmp_path / "x.eqpatch", deltas(base, UP, NORM, fraction=0.01), read_header(base))
    with np.load(path) as file:
        arrays = dict(file)

    def rewritten(**changed: Any) -> Path:
        with path.open("wb") as file:
            np.savez(file, **{**arrays, **changed})
        return path

    def facts(**changed: Any) -> np.ndarray:
        document = json.loads(arrays["facts"].tobytes())
        document["tensors"][0] |= {key: value for key, value in changed.items() if key != "version"}
        document["version"] = changed.get("version", 1)
        return np.frombuffer(json.dumps(document).encode(), dtype=np.uint8)

    for changed, message in (
        ({"indices": arrays["indices"][::-1].copy()}, "places in .* (lie outside|repeat)"),
        ({"indices": arrays["indices"] + 10**8}, f"places in {UP} lie outside its shape"),
        ({"values": arrays["values"] * np.float32(np.nan)}, "values for .* are not finite"),
        ({"values": arrays["values"][1:]}, "is no readable patch"),
        ({"indices": arrays["indices"].astype(np.int64)}, "is no readable patch"),
        ({"facts": facts(version=2)}, "patch version 2, this edgeq reads version 1. Make the patch again."),
        ({"facts": facts(grid="Q4_0")}, f"{UP} is Q4_0, whose values come in blocks"),
        ({"facts": facts(count=-1)}, "is no readable patch"),
        ({"facts": facts(name=NORM)}, "is no readable patch .a tensor occurs twice."),
        ({"facts": np.frombuffer(b"[]", dtype=np.uint8)}, "is no readable patch"),
    ):
        with pytest.raises(AdapterError, match=message):
            read_patch(rewritten(**changed))
    with pytest.raises(AdapterError, match=r"none.eqpatch does not exist. Give a patch that edgeq wrote."):
        read_patch(tmp_path / "none.eqpatch")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_truncated_patches(tmp_path: Path, data: st.DataObject) -> None:
    base = tmp_path / "tiny.gguf"
    if not base.exists():
        write_tiny_gguf(base)
        write_patch(tmp_path / "x.eqpatch", deltas(base, NORM), read_header(base))
    whole = (tmp_path / "x.eqpatch").read_bytes()
    path = tmp_path / "cut.eqpatch"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(AdapterError, match=r"is no readable patch"):
        read_patch(path)
