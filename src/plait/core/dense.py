"""DenseDelta: an update by an element-wise form, of full rank, computed in tiles of rows."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.core.delta import Delta, mode
from plait.core.route import NOWHERE, Rows
from plait.core.sharding import refuse_sharded
from plait.kernels.dense_tiles import DenseTiles, tile_rows


class DenseDelta(Delta):
    """dW by an element-wise form, of full rank; computed in tiles of rows."""

    exact_export: ClassVar[bool] = False
    joins: ClassVar[bool] = True
    tile: int | None = None  # rows of a tile; None: by device

    def weight_rows(self, start: int, stop: int) -> Tensor:
        """Rows start:stop of dW / s, (stop - start, in), in the factors' dtype."""
        raise NotImplementedError

    def _rows(self, start: int, stop: int) -> Tensor:
        return self.scaling * self.weight_rows(start, stop)

    def forward(self, x: Tensor, rows: Rows = NOWHERE) -> Tensor:
        """x dW^T, (.., in) to (.., out)."""
        return self.joint(x, None, None)

    def joint(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """x (W + dW)^T + b, (.., in) to (.., out); without a weight x dW^T.

        Args:
            x: (.., in).
            weight: frozen base weight (out, in), or None.
            bias: (out,), only with a weight.
        """
        if self.training:
            self.check_training()
        x = F.dropout(x, self.dropout, self.training)
        height = self.tile or tile_rows(self.base.in_features, x.device)
        x = x.to(self.autocast() or x.dtype)
        training = self.training  # the backward may run after eval(); the gate is the forward's

        def rows(start: int, stop: int) -> Tensor:
            with mode(self, training):
                return self._rows(start, stop)

        with torch.autocast(x.device.type, enabled=False):
            return DenseTiles.apply(
                rows, self.base.out_features, height, x, weight, bias, *self.parameters()
            )

    @torch.no_grad()
    def weight(self, **choice: Any) -> Tensor:
        """dW (out, in), by the same code and tiles as the forward."""
        if choice.get("task") is not None:
            raise ValueError(
                f"{self.adapter.key} has no tasks; task = {choice['task']!r} was given."
            )
        refuse_sharded(self, f"dW of {self.base.name}")
        first = next(self.parameters())
        height = self.tile or tile_rows(self.base.in_features, first.device)
        out = self.base.out_features
        with mode(self, training=False):
            tiles = [self._rows(a, min(a + height, out)) for a in range(0, out, height)]
        return torch.cat(tiles)

    def rank(self) -> int:
        """Attainable rank of dW: full."""
        return min(self.base.in_features, self.base.out_features)
