"""The weights of a graph that `decoder` wrote, under their canonical names again, as its operators decode them: what the gate runs its
reference on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgeq.converters.gguf.lowering import expected_shapes
from edgeq.converters.onnx.names import module_name
from edgeq.errors import SourceError
from edgeq.families import FUSED, family
from edgeq.grids import F32
from edgeq.nbits import Bnb4, NBits, Parts, decode, decode_bnb4
from edgeq.spec import ModelSpec
from edgeq.tensors import Bytes, Floats, LazyTensor

Array = npt.NDArray[Any]


def read_weights(path: Path, spec: ModelSpec) -> dict[str, LazyTensor]:
    """Tensors by canonical name, float32 when they are read. path: of model.onnx. Raises SourceError for one that is not there."""
    graph = ir.load(path).graph
    held, forms = dict(graph.initializers), dict(_forms(graph))
    row, shapes = family(spec.family), expected_shapes(spec)
    tensors = {}
    for name, shape in shapes.items():
        canonical, kind = name.rsplit(".", 1)
        read, first = None, 0
        for module, offset in ((canonical, 0), *_wholes(canonical, kind, shapes)):
            stem, first = module_name(row, module), offset
            read = _bias(held, stem) if kind == "bias" else _weight(held, forms, stem, shape)
            if read is not None:
                break
        if read is None:
            raise SourceError(f"{path}: the graph has no weights of {name}. Export the model again.")
        columns = slice(first, first + shape[0]) if kind == "bias" else slice(None)
        tensors[name] = LazyTensor(
            shape=shape, grid=F32, read=_packed(read, 0 if kind == "bias" else first, columns), origin=f"{path.name}: {name}"
        )
    return tensors


def _wholes(canonical: str, kind: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, int]]:
    """What a module may be a part of, and the row of that where it begins."""
    prefix, _, role = canonical.rpartition(".")
    for whole, parts in FUSED.items():
        if role in parts:
            before = parts[: parts.index(role)]
            yield f"{prefix}.{whole}", sum(shapes[f"{prefix}.{part}.{kind}"][0] for part in before)


Read = Callable[[int, int], Floats]  # rows from start to stop
Stored = Callable[[], Array]


def _packed(read: Read, first: int, columns: slice) -> Callable[[int, int], Bytes]:
    """Some columns of what `read` gives, counted from row `first`, as a lazy tensor wants them."""

    def rows(start: int, stop: int) -> Bytes:
        return np.ascontiguousarray(read(first + start, first + stop)[:, columns], dtype=np.float32).view(np.uint8)

    return rows


def _forms(graph: ir.Graph) -> Iterator[tuple[str, NBits | Bnb4]]:
    """How codes are to be decoded, by the name of their initializer."""
    supplied: dict[str | None, ir.Value | None] = {node.outputs[0].name: node.inputs[0] for node in graph if node.op_type == "Reshape"}
    for node in graph:
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized", "MatMulBnb4"):
            continue
        codes = node.inputs[0 if node.op_type == "GatherBlockQuantized" else 1]
        assert codes is not None
        codes = supplied.get(codes.name) or codes
        size = node.attributes["block_size"].as_int()
        if node.op_type == "MatMulBnb4":
            yield str(codes.name), Bnb4("nf4" if node.attributes["quant_type"].as_int() else "fp4", size)
        else:
            yield str(codes.name), NBits(node.attributes["bits"].as_int(), size)


def _bias(held: Mapping[str, ir.Value], stem: str) -> Read | None:
    values = _values(held, f"{stem}.Add.bias")
    return None if values is None else lambda start, stop: values()[None, :]


def _weight(held: Mapping[str, ir.Value], forms: Mapping[str, NBits | Bnb4], stem: str, shape: tuple[int, ...]) -> Read | None:
    plain, turned = _values(held, f"{stem}.weight"), _values(held, f"{stem}.MatMul.weight")
    if plain is not None:
        return lambda start, stop: plain().reshape(-1, shape[-1])[start:stop]
    if turned is not None:
        return lambda start, stop: turned()[:, start:stop].T
    for operator in ("MatMulNBits", "MatMulBnb4"):
        name = f"{stem}.{operator}"
        codes, form = _values(held, f"{name}.qweight"), forms.get(f"{name}.qweight")
        if codes is not None and isinstance(form, NBits):
            form = replace(form, zeros=f"{name}.qzeros" in held, minima=f"{name}.minima" in held)
            return _blocks(codes, form, held, name, shape[1])
        if codes is not None and isinstance(form, Bnb4):
            return _flat(codes, form, held, name, shape[1])
    return _rows(held, stem)


def _blocks(codes: Stored, form: NBits, held: Mapping[str, ir.Value], name: str, n_cols: int) -> Read | None:
    scales, zeros, minima = (_values(held, f"{name}.{part}") for part in ("scales", "qzeros", "minima"))
    if scales is None:
        return None

    def read(start: int, stop: int) -> Floats:
        offsets = None if minima is None else minima()[start:stop].astype(np.float32)
        points = None if zeros is None else zeros()[start:stop]
        return decode(Parts(codes()[start:stop], scales()[start:stop].astype(np.float32), points, offsets), form, n_cols)

    return read


def _flat(codes: Stored, form: Bnb4, held: Mapping[str, ir.Value], name: str, n_cols: int) -> Read | None:
    absmax = _values(held, f"{name}.absmax")
    if absmax is None:
        return None

    def read(start: int, stop: int) -> Floats:
        packed = codes()
        first, last = start * n_cols // form.block_size, -(-stop * n_cols // form.block_size)
        n_values = min(last * form.block_size, 2 * len(packed)) - first * form.block_size
        some = packed[first * form.block_size // 2 :][: -(-n_values // 2)]
        values = decode_bnb4(some, absmax()[first:last].astype(np.float32), form, (1, n_values))[0]
        offset = start * n_cols - first * form.block_size
        return values[offset : offset + (stop - start) * n_cols].reshape(stop - start, n_cols)

    return read


def _rows(held: Mapping[str, ir.Value], stem: str) -> Read | None:
    """8-bit codes with one scale for each output."""
    scales = _values(held, f"{stem}.MatMul.weight_scale")
    turned, plain = _values(held, f"{stem}.MatMul.weight_quantized"), _values(held, f"{stem}.weight_quantized")
    if scales is None or (turned is None and plain is None):
        return None

    def read(start: int, stop: int) -> Floats:
        codes = plain()[start:stop] if plain is not None else turned()[:, start:stop].T  # type: ignore[misc]  # one of them is there
        return codes.astype(np.float32) * scales()[start:stop, None].astype(np.float32)

    return read


def _values(held: Mapping[str, ir.Value], name: str) -> Stored | None:
    """An initializer's values, mapped anew each time, so that no page of the file outlives its use."""
    value = held.get(name)
    if value is None or value.const_value is None:
        return None
    tensor = value.const_value
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy
    shape = tuple(tensor.shape.numpy())
    return lambda: np.memmap(tensor.path, dtype=tensor.dtype.numpy(), mode="r", offset=tensor.offset or 0, shape=shape)
