"""LLM.int8(): 8 bits, but for the inputs that grow large (Dettmers et al., NeurIPS 2022, arXiv 2208.07339).

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersely.codecs import Encoded, Form, IntegerForm
from tersely.codecs.columns import Columns, ColumnsForm
from tersely.codecs.integer import round_to_grid
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.protocol import Work

_FORM = IntegerForm(bits=8, group=0, symmetric=True)


@dataclass(frozen=True)
class LLMInt8:
    """Signed bytes with a scale per output, and the columns of outlier inputs as they are.

    w = scale * code,  scale = max|w| / 127 over the columns in bytes;    w itself where max|x| >= threshold

    Which inputs are outliers is decided once, on the calibration's tokens; the paper's code finds them anew in every
    batch. That part is for the inputs' own quantizer ("int8-outliers"), which also leaves large values alone.
    """

    name: ClassVar[str] = "llm_int8"
    needs: ClassVar[frozenset[str]] = frozenset({"absmax"})
    row_wise: ClassVar[bool] = True
    keeps_zeros: ClassVar[bool] = True

    threshold: float = 6.0
    """An input that ever reaches it is an outlier."""
    most: float = 0.125
    """Share of the columns that may be kept; of more outliers, the largest are."""

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise UsageError(f"threshold={self.threshold}: expected more than 0 (6 is usual)")
        if not 0 <= self.most <= 1:
            raise UsageError(f"most={self.most}: expected a share of the columns, 0 to 1")

    def check(self, columns: int) -> None:
        """Takes any."""

    def forms(self, rows: int, columns: int) -> tuple[Form, ...]:  # noqa: ARG002 (of the protocol)
        return (_FORM, ColumnsForm(int(self.most * columns)))

    def work(self, rows: int, columns: int) -> Work:  # noqa: ARG002 (of the protocol)
        return Work(passes=2)

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:
        outliers, note = self._outliers(stats)
        rest_OI = weight_OI
        if len(outliers):
            rest_OI = weight_OI.clone()
            rest_OI[:, outliers] = 0
        scale_OG = (rest_OI.abs().amax(1, keepdim=True).float() / 127).to(weight_OI.dtype)
        limits = torch.finfo(weight_OI.dtype)
        scale_OG = torch.where(scale_OG < limits.smallest_normal, limits.eps, scale_OG)
        codes = round_to_grid(rest_OI, scale_OG, None, _FORM)
        if not len(outliers):
            return Encoded((codes,), note)
        columns = Columns(weight_OI[:, outliers], outliers.to(torch.int32), weight_OI.shape[1])
        return Encoded((codes, columns), note)

    def _outliers(self, stats: Statistics) -> tuple[Tensor, str]:
        """Indices of the columns to keep, rising, and what there is to say."""
        absmax_I = stats.absmax_I
        if absmax_I is None:
            return torch.empty(0, dtype=torch.int64), "no tokens: no columns are kept"
        found = int((absmax_I >= self.threshold).sum())
        kept = min(found, int(self.most * stats.columns))
        largest = torch.argsort(absmax_I, descending=True, stable=True)[:kept].sort().values
        return largest, "" if kept == found else f"{found} inputs reach {self.threshold:g}: the {kept} largest are kept"
