"""8-bit integers per output channel, after Krishnamoorthi 2018, arXiv:1806.08342.

Weights are symmetric per channel: scale = max |w| / 127 over the inputs of one output, code = round(w / scale). Activations are asymmetric
per tensor, uint8: scale = (high - low) / 255 with zero inside the range, zero point = round(-low / scale). Scales and codes are those of
onnxruntime.quantization with QInt8 weights, per_channel, and QUInt8 activations.

    w8            DequantizeLinear of the weight, MatMul. In the graph activations stay floats; ONNX Runtime makes MatMulNBits of the two
                  and rounds activations, too, unless session.qdq_matmulnbits_accuracy_level is 1
    w8a8-dynamic  DynamicQuantizeLinear measures every input when it comes; MatMulInteger
    w8a8-static   QuantizeLinear and DequantizeLinear around ranges found in calibration; ONNX Runtime multiplies integers

Weights are stored as MatMul reads them, int8 (n_in, n_out), with scales float (n_out,). CPUs without VNNI instructions add pairs of
products of such operands in 16 bits, which can saturate; their results then differ a little from these definitions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgeq.converters.gguf.encode import RegridError
from edgeq.converters.onnx.builder import Builder, Dim, shape_of
from edgeq.converters.onnx.packed import Packed, as_float_type, as_scales, columns, row_spans
from edgeq.errors import MissingDependency, PlanError, SourceError
from edgeq.group_grids import GroupGrid, group_grid
from edgeq.tensors import Floats, LazyTensor

Array = npt.NDArray[Any]
Format = Literal["w8", "w8a8-dynamic", "w8a8-static"]
FORMATS: tuple[Format, ...] = ("w8", "w8a8-dynamic", "w8a8-static")

_INT8, _UINT8 = ir.DataType.INT8, ir.DataType.UINT8
_MATMUL_WEIGHT = ".MatMul.weight"


@dataclass(frozen=True)
class Int8Grid(GroupGrid):
    """Codes with one scale for a row, in a layer of the format `name`. low, high: range of its input, for w8a8-static."""

    low: float
    high: float


def int8_grid(form: Format, n_cols: int, activations: tuple[float, float] | None = None) -> Int8Grid:
    """The grid for rows of `n_cols` values. activations: least and greatest input, for w8a8-static only.

    Raises PlanError for other formats, and where the range is missing or superfluous.
    """
    if form not in FORMATS:
        raise PlanError(f"{form!r} is no 8-bit format; choose one of {', '.join(FORMATS)}")
    if (form == "w8a8-static") != (activations is not None):
        raise PlanError(f"{form}: the range of activations goes with w8a8-static, and only with it")
    base = group_grid(form, code_bits=8, block_size=n_cols, scale="F32", center=128)
    low, high = activations or (0.0, 0.0)
    return Int8Grid(**{name: getattr(base, name) for name in GroupGrid.__dataclass_fields__}, low=low, high=high)


def activation_scale(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of uint8 values that span low..high, and zero."""
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    scale = (high - low) / 255
    if scale < np.finfo(np.float32).tiny:
        return np.float32(1), np.uint8(0)
    return np.float32(scale), np.uint8(np.round(-low / scale))


def channel_scales(values: Floats) -> Floats:
    """Scale of each row of (n_out, n_in)."""
    scales = (2.0 * np.abs(values).max(1).astype(np.float64)) / 254
    return np.where(scales < np.finfo(np.float32).tiny, 1.0, scales).astype(np.float32)


def multiply(g: Builder, x: ir.Value, packed: Packed, path: str, codes: ir.Value | None = None) -> ir.Value:
    """x (.., n_in) times the transpose of a weight (n_out, n_in) in an Int8Grid. codes: (n_in, n_out), where they are stored already."""
    grid = packed.grid
    assert isinstance(grid, Int8Grid)
    n_out, n_in = packed.weight.shape
    channels = _Channels(packed)
    shape = [*shape_of(x)[:-1], n_out]
    if codes is None:
        codes = g.stream(f"{packed.name}{_MATMUL_WEIGHT}_quantized", _INT8, (n_in, n_out), channels.transposed)
    scales = _scales(g, packed, channels)
    zeros = g.stream(f"{packed.name}{_MATMUL_WEIGHT}_zero_point", _INT8, (n_out,), lambda: [np.zeros(n_out, dtype=np.int8)])
    if grid.name == "w8a8-dynamic":
        return _dynamic(g, x, codes, scales, zeros, path, shape)
    if grid.name == "w8a8-static":
        x = _fake_quantized(g, x, grid)
    w = g.node("DequantizeLinear", [codes, scales, zeros], path=f"{path}/DequantizeLinear", shape=[n_in, n_out], attributes={"axis": 1})
    return g.node("MatMul", [x, w], path=f"{path}/MatMul", shape=shape)


def table(g: Builder, packed: Packed) -> tuple[ir.Value, ir.Value]:
    """Codes (n_rows, n_cols) and scales (n_rows,) of an embedding."""
    channels = _Channels(packed)
    codes = g.stream(f"{packed.name}.weight_quantized", _INT8, packed.weight.shape, channels.rows)
    return codes, _scales(g, packed, channels)


def gather(g: Builder, ids: ir.Value, packed: Packed, path: str) -> ir.Value:
    """Rows of an embedding: code times scale."""
    codes, scales = table(g, packed)
    outer = shape_of(ids)
    shape: list[Dim] = [*outer, packed.weight.n_cols]
    picked = g.node("Gather", [codes, ids], path=f"{path}/Gather", dtype=_INT8, shape=shape, attributes={"axis": 0})
    picked = g.node("Cast", [picked], path=f"{path}/Cast", shape=shape, attributes={"to": g.float_type})
    scale = g.node("Gather", [scales, ids], path=f"{path}/Scales/Gather", shape=outer, attributes={"axis": 0})
    axis = g.constant("/model/constants/last_axis", np.array([-1], dtype=np.int64))
    scale = g.node("Unsqueeze", [scale, axis], path=f"{path}/Scales/Unsqueeze", shape=[*outer, 1])
    return g.node("Mul", [picked, scale], path=f"{path}/Mul", shape=shape)


def activation_ranges(model: Path, feeds: Iterable[Mapping[str, Array]]) -> dict[str, tuple[float, float]]:
    """Least and greatest value that came into each linear layer of a float model.onnx, over all feeds, by the layer's name.

    A head that is tied to the embedding has no weight of its own and goes by its path ("/lm_head" is "lm_head").

    Raises MissingDependency without ONNX Runtime, SourceError when there is no feed or a value is not finite.
    """
    try:
        import onnxruntime as ort
    except ImportError as err:
        raise MissingDependency("onnxruntime", "onnx") from err
    graph_model = ir.load(model)
    inputs = dict(_linear_inputs(graph_model.graph))
    _observe(graph_model.graph, inputs)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.parent))
    proto = ir.serde.serialize_model(graph_model).SerializeToString()
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    wanted = sorted({f"{x.name}/{end}" for x in inputs.values() for end in ("min", "max")})
    seen: dict[str, list[float]] = {name: [] for name in wanted}
    for feed in feeds:
        for name, value in zip(wanted, session.run(wanted, dict(feed)), strict=True):
            seen[name].append(float(value))
    for name, values in seen.items():
        if not values or not np.isfinite(values).all():
            raise SourceError(f"{model}: {name} of the calibration is {values[-1] if values else 'missing'}. Calibrate on another text.")
    return {name: (min(seen[f"{x.name}/min"]), max(seen[f"{x.name}/max"])) for name, x in inputs.items()}


def _linear_inputs(graph: ir.Graph) -> Iterator[tuple[str, ir.Value]]:
    for node in graph:
        if node.op_type != "MatMul":
            continue
        x, weight = node.inputs
        assert x is not None and weight is not None
        maker = weight.producer()
        if weight.is_initializer() and str(weight.name).endswith(_MATMUL_WEIGHT):
            yield str(weight.name).removesuffix(_MATMUL_WEIGHT), x
        elif maker is not None and maker.op_type == "Transpose" and maker.inputs[0] is not None and maker.inputs[0].is_initializer():
            yield str(node.name).removesuffix("/MatMul").strip("/").replace("/", "."), x


def _observe(graph: ir.Graph, inputs: Mapping[str, ir.Value]) -> None:
    """Make least and greatest value of these, `<value>/min` and `<value>/max`, outputs of the graph."""
    for x in {value.name: value for value in inputs.values()}.values():
        for op, end in (("ReduceMin", "min"), ("ReduceMax", "max")):
            node = ir.node(op, [x], attributes={"keepdims": 0}, name=f"{x.name}/{op}")
            out = node.outputs[0]
            out.name, out.dtype, out.shape = f"{x.name}/{end}", x.dtype or ir.DataType.FLOAT, ir.Shape([])
            graph.append(node)
            graph.outputs.append(out)


class _Channels:
    """Scales of all rows of a weight, found once, and its codes by rows and by columns.

    A weight that has one scale per row and codes around 128 already keeps both.
    """

    def __init__(self, packed: Packed) -> None:
        self._packed = packed
        self._found: Floats | None = None

    def scales(self) -> Floats:
        if self._found is None:
            weight = self._packed.weight
            self._found = np.concatenate([self._row_scales(weight, start, stop) for start, stop in row_spans(weight)])
        return self._found

    def rows(self) -> Iterator[Array]:
        weight = self._packed.weight
        error = RegridError(0, 0, 0, 0)
        for start, stop in row_spans(weight):
            values = weight.decode(start, stop)
            codes = self._codes(values, start)
            error += self._error(values, codes, start, 0)
            yield codes
        self._note(error)

    def transposed(self) -> Iterator[Array]:
        error = RegridError(0, 0, 0, 0)

        def convert(values: Floats, row: int, column: int) -> Array:
            nonlocal error
            codes = self._codes(values, row)
            error += self._error(values, codes, row, column)
            return codes

        yield from columns(self._packed.weight, np.int8, convert)
        self._note(error)

    def _row_scales(self, weight: LazyTensor, start: int, stop: int) -> Floats:
        grid = weight.grid
        if isinstance(grid, GroupGrid) and grid.code_bits == 8 and grid.center == 128 and not (grid.zero or grid.table or grid.order):
            stored = grid.unpack(np.ascontiguousarray(weight.packed(start, stop)))[1]
            if stored.shape[1] == 1:
                return as_scales(stored[:, 0].astype(np.float32), ir.DataType.FLOAT, weight.origin)
        return channel_scales(as_float_type(weight.decode(start, stop), ir.DataType.FLOAT, weight.origin))

    def _codes(self, values: Floats, row: int) -> Array:
        scaled = values / self.scales()[row : row + len(values), None]
        return np.clip(np.rint(scaled), -128, 127).astype(np.int8)

    def _error(self, values: Floats, codes: Array, row: int, column: int) -> RegridError:
        lost = (values - codes * self.scales()[row : row + len(values), None]).astype(np.float64) ** 2
        squares = values.astype(np.float64) ** 2
        importance = self._packed.importance
        w = np.ones(values.shape[1]) if importance is None else importance[column : column + values.shape[1]].astype(np.float64)
        return RegridError(float(lost.sum()), float(squares.sum()), float((lost @ w).sum()), float((squares @ w).sum()))

    def _note(self, error: RegridError) -> None:
        if self._packed.errors is not None and not self._packed.kept:
            self._packed.errors[self._packed.name] = error


def _scales(g: Builder, packed: Packed, channels: _Channels) -> ir.Value:
    weight = packed.weight
    return g.stream(
        f"{packed.name}{_MATMUL_WEIGHT}_scale",
        g.float_type,
        (weight.n_rows,),
        lambda: [as_scales(channels.scales(), g.float_type, weight.origin)],
    )


def _fake_quantized(g: Builder, x: ir.Value, grid: Int8Grid) -> ir.Value:
    """x rounded to uint8 and back; made once for all that read it with this range."""
    scale, zero = activation_scale(grid.low, grid.high)
    path = f"{x.name}/{scale:.8e},{zero:03d}"  # as long for every range, so that the size of a graph is known before its ranges are

    def make() -> ir.Value:
        s = g.constant(f"{path}/scale", as_scales(np.array(scale), g.float_type, path))
        z = g.constant(f"{path}/zero_point", np.array(zero))
        q = g.node("QuantizeLinear", [x, s, z], path=f"{path}/QuantizeLinear", dtype=_UINT8, shape=shape_of(x))
        return g.node("DequantizeLinear", [q, s, z], path=f"{path}/DequantizeLinear", shape=shape_of(x))

    return g.once(path, make)


def _dynamic(g: Builder, x: ir.Value, codes: ir.Value, scales: ir.Value, zeros: ir.Value, path: str, shape: list[Dim]) -> ir.Value:
    q, x_scale, x_zero = g.once_all(("dynamic", x.name), partial(_measured, g, x))
    integer = g.node("MatMulInteger", [q, codes, x_zero, zeros], path=f"{path}/MatMulInteger", dtype=ir.DataType.INT32, shape=shape)
    y = g.node("Cast", [integer], path=f"{path}/Cast", shape=shape, attributes={"to": g.float_type})
    both = g.node("Mul", [x_scale, scales], path=f"{path}/Scales/Mul", shape=shape[-1:])
    return g.node("Mul", [y, both], path=f"{path}/Mul", shape=shape)


def _measured(g: Builder, x: ir.Value) -> tuple[ir.Value, ...]:
    """x as uint8, its scale in the graph's float type, and its zero point."""
    floats = ir.DataType.FLOAT
    path = f"{x.name}/DynamicQuantizeLinear"
    single = x
    if g.float_type != floats:
        single = g.node("Cast", [x], path=f"{path}/Cast", dtype=floats, shape=shape_of(x), attributes={"to": floats})
    q, scale, zero = g.nodes("DynamicQuantizeLinear", [single], path=path, outputs=[(_UINT8, shape_of(x)), (floats, []), (_UINT8, [])])
    if g.float_type != floats:
        scale = g.node("Cast", [scale], path=f"{path}/Scale/Cast", shape=[], attributes={"to": g.float_type})
    return q, scale, zero
