"""Importance gathered while something else runs a model: sorting passes all calibration tokens through it anyway."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from edgeq.calibration import Importance, InputSquares
from edgeq.reference import Observer, Point, Reference
from edgeq.spec import Attention, Block, ModelSpec
from edgeq.tensors import LazyTensor


class Listening(Reference):
    """A reference that adds up the squared inputs of its linears whenever it runs without gradients."""

    def __init__(self, spec: ModelSpec, tensors: Mapping[str, LazyTensor]) -> None:
        super().__init__(spec, tensors)
        self._squares = InputSquares()

    def layer(self, blocks: Sequence[Block]) -> Callable[[torch.Tensor, Observer], torch.Tensor]:
        run = super().layer(blocks)

        def heard(states: torch.Tensor, observe: Observer) -> torch.Tensor:
            def both(layer: int | None, point: Point, x: torch.Tensor) -> None:
                observe(layer, point, x)
                if not torch.is_grad_enabled():
                    self._squares.add(layer, point, x)

            return run(states, both)

        return heard

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self._squares.add(None, "head_in", hidden)
        return super().logits(hidden)

    def importance(self) -> Importance | None:
        """As `edgeq.calibration.importance`; None when not all of the model has been run. Raises SourceError as that does."""
        found = self._squares.importance()
        wanted = {"head"} | {f"layers.{b.layer}.{'wo' if isinstance(b, Attention) else 'down'}" for b in self.spec.blocks}
        return found if wanted <= found.keys() else None
