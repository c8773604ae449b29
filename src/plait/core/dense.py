"""DenseDelta: an update by an element-wise form, of full rank, computed in tiles of rows."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.core.delta import Delta, computes_in, mode
from plait.core.gate import states
from plait.core.route import NOWHERE, Rows
from plait.core.sharding import refuse_sharded
from plait.kernels.cache import traced
from plait.kernels.choose import switches
from plait.kernels.dense_tiles import DenseTiles, tile_rows
from plait.kernels.signed_tiles import SignedTiles, signed_weight


class DenseDelta(Delta):
    """dW by an element-wise form, of full rank; computed in tiles of rows."""

    exact_export: ClassVar[bool] = False
    tile: int | None = None  # rows of a tile; None: by device

    def weight_rows(self, start: int, stop: int) -> Tensor:
        """Rows start:stop of dW / s, (stop - start, in), in the factors' dtype."""
        raise NotImplementedError

    def signed(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float, bool] | None:
        """A, B, C, D, c and whether sgn clips its gradient, if dW = c relu(B A) * sgn(D C).

        Who overrides weight_rows states it again, else the tiles are differentiated by autograd.
        """
        return None

    def _rows(self, start: int, stop: int) -> Tensor:
        return self.scaling * self.weight_rows(start, stop)

    def forward(self, x: Tensor, rows: Rows = NOWHERE) -> Tensor:
        """x dW^T, (.., in) to (.., out)."""
        return self.joint(x, None, None)

    def joins(self, x: Tensor, transposed: bool) -> bool:
        """Without dropout; a fresh update, computed apart, leaves the base's output as it is."""
        dropped = self.training and self.dropout
        return not (dropped or transposed) and (self.training or not self.fresh)

    def joint(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rows: Rows = NOWHERE,
        y: Tensor | None = None,
    ) -> Tensor:
        """x (W + dW)^T + b, (.., in) to (.., out); without a weight x dW^T.

        Args:
            x: (.., in).
            weight: frozen base weight (out, in), or None.
            bias: (out,), only with a weight.
            rows, y: not used.
        """
        if torch.compiler.is_compiling():  # the tiles are one break of the graph, not several
            return _uncompiled(self, x, weight, bias)
        return self._joint(x, weight, bias)

    def _joint(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """As `joint`, never compiled."""
        if self.training:
            self.check_training()
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        height = self.tile or tile_rows(self.base.in_features, x.device)
        form = (
            self.signed()
            if switches.fused and not traced() and states(type(self), "signed", "weight_rows")
            else None
        )
        if form is not None and _fuses(*form[:4]):
            return self._signed(form, height, x, weight, bias)
        x = x.to(self.autocast() or x.dtype)
        training = self.training  # the backward may run after eval(); the gate is the forward's

        def rows_of(start: int, stop: int) -> Tensor:
            with mode(self, training):
                return self._rows(start, stop)

        with torch.autocast(x.device.type, enabled=False):
            return DenseTiles.apply(
                rows_of, self.base.out_features, height, x, weight, bias, *self.parameters()
            )

    def _signed(
        self,
        form: tuple[Tensor, Tensor, Tensor, Tensor, float, bool],
        height: int,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """As `joint`, by the closed form."""
        *factors, c, clip = form
        dtype, whole = computes_in(x), None
        if weight is not None and switches.dense == "cached":
            where = (weight.data_ptr(), weight._version, weight.shape)
            whole = self.kept.get(
                ("whole", dtype, height, c, where),
                factors,
                lambda: signed_weight(weight, c, height, dtype, *factors),
            )
        return SignedTiles.apply(c, clip, height, dtype, whole, x, weight, bias, *factors)  # type: ignore

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


def _tiles(delta: DenseDelta, *args: Any) -> Tensor:
    return delta._joint(*args)


_uncompiled: Any = torch.compiler.disable(_tiles)


def _fuses(*factors: Tensor) -> bool:
    """Whether the closed form applies to these factors: all alike, fp32 or wider."""
    dtype = factors[0].dtype
    return dtype in (torch.float32, torch.float64) and all(t.dtype == dtype for t in factors)
