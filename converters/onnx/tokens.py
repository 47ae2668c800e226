"""What attention has to know of tokens, computed from a graph's inputs: places and positions, and who may see whom.

The attention mask says how many tokens each text of a batch has, new ones included, and which places of the longest are padding. A token's
position is the number of tokens before it that the mask counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgeq.converters.onnx.builder import Builder, Dim

_I64, _I32, _BOOL = ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL
NEW: list[Dim] = ["batch_size", "sequence_length"]
ALL: list[Dim] = ["batch_size", "total_sequence_length"]
_PAIRS: list[Dim] = ["batch_size", "sequence_length", "total_sequence_length"]
_END = np.iinfo(np.int64).max


class Tokens:
    """Every value is made once, when it is first asked for."""

    def __init__(self, g: Builder) -> None:
        self._g = g
        self.ids = g.input("input_ids", _I64, NEW)
        self._mask = g.input("attention_mask", _I64, ALL)

    def last(self) -> ir.Value:
        """The place of every text's last token, int32 (batch_size,), padding not counted."""
        return self._g.once("last", self._last)

    def total(self) -> ir.Value:
        """Tokens of the longest text, padding included, int32."""
        return self._g.once("total", self._total)

    def positions(self) -> ir.Value:
        """Positions of new tokens, int64 (batch_size, sequence_length)."""
        return self._g.once("positions", self._positions)

    def visible(self, window: int | None) -> ir.Value:
        """Which tokens a new one may see, bool (batch_size, 1, sequence_length, total_sequence_length): the last `window` up to itself.

        Tokens behind it among the new ones are left to the operator, which has to be told that attention is causal.
        """
        return self._g.once(("visible", window), lambda: self._visible(window))

    def _last(self) -> ir.Value:
        path = "/model/attention_mask/last"
        one = self._ints(1)
        count = self._node("ReduceSum", [self._mask, one], path, _I64, ["batch_size"], keepdims=0)
        place = self._node("Sub", [count, one], path, _I64, ["batch_size"])
        return self._node("Cast", [place], path, _I32, ["batch_size"], to=_I32)

    def _total(self) -> ir.Value:
        path = "/model/attention_mask/total"
        shape = self._node("Shape", [self._mask], path, _I64, [2])
        total = self._node("Gather", [shape, self._int(1)], path, _I64, [], axis=0)
        return self._node("Cast", [total], path, _I32, [], to=_I32)

    def _all_positions(self) -> ir.Value:
        path = "/model/positions/all"
        count = self._node("CumSum", [self._mask, self._int(1)], path, _I64, ALL)
        before = self._node("Sub", [count, self._int(1)], path, _I64, ALL)
        return self._node("Max", [before, self._int(0)], path, _I64, ALL)

    def _positions(self) -> ir.Value:
        path = "/model/positions/new"
        n_new = self._node("Shape", [self.ids], path, _I64, [1], start=1)
        first = self._node("Neg", [n_new], path, _I64, [1])
        places = self._g.once("all positions", self._all_positions)
        return self._node("Slice", [places, first, self._ints(_END), self._ints(1)], path, _I64, NEW)

    def _visible(self, window: int | None) -> ir.Value:
        path = f"/model/attention_mask/visible/{window or 'all'}"
        back = self._g.once("back", self._back)
        if window is None:  # the operator wants a row of the mask for each new token
            near = self._node("GreaterOrEqual", [back, self._int(0)], path, _BOOL, _PAIRS)
        else:
            near = self._node("Less", [back, self._int(window)], path, _BOOL, _PAIRS)
        seen = self._node("And", [near, self._g.once("there", self._there)], path, _BOOL, _PAIRS)
        return self._node("Unsqueeze", [seen, self._ints(1)], path, _BOOL, ["batch_size", 1, *_PAIRS[1:]])

    def _back(self) -> ir.Value:
        """By how many positions a new token comes after each one."""
        path = "/model/positions/back"
        new = self._node("Unsqueeze", [self.positions(), self._ints(2)], f"{path}/new", _I64, [*NEW, 1])
        places = self._g.once("all positions", self._all_positions)
        before = self._node("Unsqueeze", [places, self._ints(1)], f"{path}/all", _I64, [ALL[0], 1, ALL[1]])
        return self._node("Sub", [new, before], path, _I64, _PAIRS)

    def _there(self) -> ir.Value:
        """Which places are not padding, bool (batch_size, 1, total_sequence_length)."""
        path = "/model/attention_mask/there"
        there = self._node("Cast", [self._mask], path, _BOOL, ALL, to=_BOOL)
        return self._node("Unsqueeze", [there, self._ints(1)], path, _BOOL, [ALL[0], 1, ALL[1]])

    def _node(
        self, op: str, inputs: Sequence[ir.Value], path: str, dtype: ir.DataType, shape: Sequence[Dim], **attributes: object
    ) -> ir.Value:
        return self._g.node(op, inputs, path=f"{path}/{op}", dtype=dtype, shape=shape, attributes=attributes)

    def _ints(self, value: int) -> ir.Value:
        return self._g.constant(f"/model/constants/ints/{value}", np.array([value], dtype=np.int64))

    def _int(self, value: int) -> ir.Value:
        return self._g.constant(f"/model/constants/int/{value}", np.array(value, dtype=np.int64))
