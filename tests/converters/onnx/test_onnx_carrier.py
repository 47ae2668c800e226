"""Files as predicted, the same bytes every time, read back by onnx and ONNX Runtime, and written in little memory."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgeq.converters.onnx.builder import Builder
from edgeq.converters.onnx.carrier import ALIGNMENT, DATA_FILE, MODEL_FILE, predicted_bytes, write_onnx
from edgeq.converters.onnx.weights import embedding, head, linear
from edgeq.errors import OutputError, ShapeError
from edgeq.grids import F32
from edgeq.nbits import nbits_grid
from edgeq.tensors import from_values

Array = np.ndarray[Any, np.dtype[Any]]
METADATA = {"edgeq.plan": "abc", "edgeq.version": "1"}


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def small_model() -> Builder:
    """An embedding, two linear layers in different grids with biases, and a tied head."""
    g = Builder("small", float_type=ir.DataType.FLOAT)
    ids = g.input("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
    table = from_values(normal(101, 72), origin="embed")
    x = embedding(g, ids, table, path="/model/embed_tokens", name="model.embed_tokens", grid=nbits_grid(8, 32, symmetric=False, n_cols=72))
    for i, grid in enumerate((F32, nbits_grid(4, 64, symmetric=False, n_cols=72))):
        weight, bias = from_values(normal(72, 72, seed=i), origin="w"), from_values(normal(72, seed=i), origin="b")
        x = linear(g, x, weight, bias, path=f"/model/layers.{i}/up", name=f"model.layers.{i}.up", grid=grid)
    grid = nbits_grid(8, 32, symmetric=False, n_cols=72)
    y = head(g, x, table, path="/lm_head", name="lm_head", grid=grid, tied_to="model.embed_tokens")
    g.output(y, "logits", ir.DataType.FLOAT, ["batch_size", "sequence_length", 101])
    return g


def test_files_are_as_large_as_predicted_and_have_the_hashes_that_are_told(tmp_path: Path) -> None:
    g = small_model()
    predicted = predicted_bytes(g, metadata=METADATA)
    written = write_onnx(tmp_path, g, metadata=METADATA)
    assert [file.name for file in written] == [DATA_FILE, MODEL_FILE] and sorted(p.name for p in tmp_path.iterdir()) == [
        MODEL_FILE,
        DATA_FILE,
    ]
    for file in written:
        data = (tmp_path / file.name).read_bytes()
        assert file.nbytes == len(data) and file.sha256 == hashlib.sha256(data).hexdigest()
    assert sum(file.nbytes for file in written) == predicted
    assert predicted_bytes(g) < predicted


def test_bytes_are_the_same_every_time(tmp_path: Path) -> None:
    g = small_model()
    for name, builder in (("a", g), ("b", g), ("c", small_model())):
        (tmp_path / name).mkdir()
        write_onnx(tmp_path / name, builder, metadata=METADATA)
    for file in (MODEL_FILE, DATA_FILE):
        assert len({(tmp_path / name / file).read_bytes() for name in "abc"}) == 1


def test_weights_lie_in_order_and_aligned_and_small_constants_in_the_graph(tmp_path: Path) -> None:
    g = small_model()
    in_memory = {name: value.const_value.tobytes() for name, value in g.model().graph.initializers.items()}
    write_onnx(tmp_path, g)
    proto = onnx.load(str(tmp_path / MODEL_FILE), load_external_data=False)
    data = (tmp_path / DATA_FILE).read_bytes()
    end = 0
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {e.key: e.value for e in tensor.external_data}
            offset, length = int(entry["offset"]), int(entry["length"])
            assert entry["location"] == DATA_FILE and offset % ALIGNMENT == 0 and 0 <= offset - end < ALIGNMENT
            assert data[offset : offset + length] == in_memory[tensor.name] and not any(data[end:offset])
            end = offset + length
        else:
            assert len(tensor.raw_data) <= 256 and tensor.raw_data == in_memory[tensor.name]
    assert end == len(data)
    assert [t.name for t in proto.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL] == [
        "/model/embed_tokens/Reshape/shape",
        *(f"/model/embed_tokens/Slice/{key}" for key in ("start", "end", "axis")),
    ]


def test_what_was_written_is_a_sound_model_that_onnx_runtime_runs(tmp_path: Path) -> None:
    g = small_model()
    write_onnx(tmp_path, g, metadata=METADATA)
    proto = onnx.load(str(tmp_path / MODEL_FILE), load_external_data=False)
    onnx.checker.check_model(str(tmp_path / MODEL_FILE))
    assert {p.key: p.value for p in proto.metadata_props} == METADATA and proto.producer_name == "edgeq" and proto.ir_version == 10
    assert {o.domain: o.version for o in proto.opset_import} == {"": 23, "com.microsoft": 1}
    assert len({node.name for node in proto.graph.node}) == len(proto.graph.node)
    fed = {"input_ids": np.array([[3, 100, 7]])}
    from_file = ort.InferenceSession(str(tmp_path / MODEL_FILE), providers=["CPUExecutionProvider"]).run(None, fed)[0]
    whole = ir.serde.serialize_model(g.model()).SerializeToString()  # the builder's own tensors are as before
    assert np.array_equal(ort.InferenceSession(whole, providers=["CPUExecutionProvider"]).run(None, fed)[0], from_file)


def test_progress_counts_bytes_to_the_end(tmp_path: Path) -> None:
    seen: list[tuple[str, float, float]] = []
    g = small_model()
    write_onnx(tmp_path, g, progress=lambda step, done, total: seen.append((step, done, total)))
    assert {(step, total) for step, _, total in seen} == {("write", predicted_bytes(g))}
    done = [at for _, at, _ in seen]
    assert done == sorted(done) and done[-1] == predicted_bytes(g) and len(done) > 5


def graph_of(chunks: Any, shape: tuple[int, ...] = (4, 100)) -> Builder:
    g = Builder("one", float_type=ir.DataType.FLOAT)
    x = g.input("x", ir.DataType.FLOAT, [1, shape[0]])
    g.output(g.node("MatMul", [x, g.stream("w", ir.DataType.FLOAT, shape, chunks)], path="/m"), "y", ir.DataType.FLOAT, [1, shape[1]])
    return g


@pytest.mark.parametrize(("rows", "said"), [(3, "400 bytes too short for 1600 bytes"), (5, "400 bytes too long for 1600 bytes")])
def test_data_of_another_length_than_its_shape_is_refused(rows: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=f"w: its data is {said}"):
        write_onnx(tmp_path, graph_of(lambda: [np.zeros((rows, 100), dtype=np.float32)]))


def test_a_full_disk_says_how_much_room_is_missing() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgeq.converters.onnx.carrier.DATA_FILE", "full")
        with pytest.raises(OutputError, match=r"/dev/full: writing stopped after 0 of [\d,]+ bytes: No space left on device"):
            write_onnx(Path("/dev"), graph_of(lambda: [np.zeros((4, 100), dtype=np.float32)]))


def test_a_graph_without_weights_has_no_data_file(tmp_path: Path) -> None:
    g = Builder("none", float_type=ir.DataType.FLOAT)
    x = g.input("x", ir.DataType.FLOAT, [1, 2])
    g.output(g.node("Neg", [x], path="/n"), "y", ir.DataType.FLOAT, [1, 2])
    assert [file.name for file in write_onnx(tmp_path, g)] == [MODEL_FILE]
    assert predicted_bytes(g) == (tmp_path / MODEL_FILE).stat().st_size


def test_offsets_beyond_2_gib_are_read_by_onnx_runtime(tmp_path: Path) -> None:
    """The first weight is 2.2 GiB that are never written: a hole in the file, made by skipping it."""
    g = Builder("large", float_type=ir.DataType.FLOAT)
    x = g.input("x", ir.DataType.FLOAT, [1, 3])
    ids = g.input("ids", ir.DataType.INT64, [1])
    rows = 600_000
    big = g.stream("big", ir.DataType.FLOAT, (rows, 1000), lambda: iter(()))
    small = normal(3, 100)
    w = g.stream("w", ir.DataType.FLOAT, small.shape, lambda: [small])
    g.output(g.node("MatMul", [x, w], path="/m"), "y", ir.DataType.FLOAT, [1, 100])
    g.output(g.node("Gather", [big, ids], path="/g"), "z", ir.DataType.FLOAT, [1, 1000])
    assert predicted_bytes(g) > 2_400_000_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgeq.converters.onnx.carrier._data", lambda places: iter([small.tobytes()]))
        patch.setattr("edgeq.gguf_write.OutputFile.__init__", starting_at(rows * 4000))
        write_onnx(tmp_path, g)
    y, z = ort.InferenceSession(str(tmp_path / MODEL_FILE), providers=["CPUExecutionProvider"]).run(
        None, {"x": np.ones((1, 3), dtype=np.float32), "ids": np.array([rows - 1])}
    )
    np.testing.assert_allclose(y, small.sum(0, keepdims=True), rtol=1e-5)
    assert not z.any()


def starting_at(offset: int) -> Any:
    """OutputFile.__init__ for a data file whose beginning is a hole."""
    from edgeq.gguf_write import OutputFile

    original = OutputFile.__init__

    def init(self: OutputFile, path: Path, total: int, digest: Any) -> None:
        original(self, path, total, digest)
        if path.name == DATA_FILE:
            self.file.seek(offset)

    return init


WRITER = """
import resource, sys
from pathlib import Path
import numpy as np, onnx_ir as ir
from edgeq.converters.onnx.builder import Builder
from edgeq.converters.onnx.carrier import predicted_bytes, write_onnx
from edgeq.converters.onnx.weights import embedding, head, linear
from edgeq.grids import BF16, F32, grid
from edgeq.nbits import nbits_grid
from edgeq.tensors import LazyTensor

def random(n_rows, n_cols, seed):
    def read(start, stop):
        bits = np.random.default_rng([seed, start]).integers(0, 1 << 15, (stop - start, n_cols), dtype=np.uint16)
        return (bits & 0x3FFF | 0x2000).view(np.uint8)
    return LazyTensor(shape=(n_rows, n_cols), grid=BF16, read=read, origin="random")

def model(form):
    g = Builder("large", float_type=ir.DataType.FLOAT)
    ids = g.input("ids", ir.DataType.INT64, ["b", "s"])
    table = random(48000, 2048, 0)
    grid = F32 if form == "F32" else nbits_grid(8, 32, symmetric=True, n_cols=2048)
    x = embedding(g, ids, table, path="/e", name="e", grid=grid)
    for i in range(3 if form == "F32" else 20):
        layer = F32 if form == "F32" else nbits_grid(4, 64, symmetric=False, n_cols=2048)
        x = linear(g, x, random(2048 * 4, 2048, i + 1), None, path=f"/l{i}", name=f"l{i}", grid=layer)
        x = g.node("Slice", [x, *(g.constant(n, np.array([v])) for n, v in (("a", 0), ("b", 2048), ("c", -1)))], path=f"/s{i}",
                   shape=["b", "s", 2048])
    g.output(head(g, x, table, path="/h", name="h", grid=grid, tied_to="e"), "y", ir.DataType.FLOAT, ["b", "s", 48000])
    return g

g = model(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
files = write_onnx(Path(sys.argv[1]), g)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(sum(f.nbytes for f in files), predicted_bytes(g), grown * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["F32", "integers"])
def test_memory_does_not_grow_with_the_model(form: str, tmp_path: Path) -> None:
    def written() -> Iterator[int]:
        out = subprocess.run(
            [sys.executable, "-c", WRITER, str(tmp_path), form], capture_output=True, text=True, check=True, cwd=tmp_path
        ).stdout
        yield from map(int, out.split())

    nbytes, predicted, grown = written()
    assert nbytes == predicted and nbytes > (580_000_000 if form == "F32" else 290_000_000)
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) == nbytes
    assert grown < 256 << 20  # 128 and 147 MB measured
    first = [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in (MODEL_FILE, DATA_FILE)]
    list(written())
    assert first == [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in (MODEL_FILE, DATA_FILE)]
