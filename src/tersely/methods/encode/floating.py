"""What the methods that leave small floats share: rounding to nearest, or by the GPTQ sweep, with scales fixed before.

Shapes: O outputs, I inputs, G blocks of inputs per output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from tersely.codecs import Encoded
from tersely.codecs.floats import FloatForm, Floats, round_to_floats
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.gptq import GPTQ
from tersely.methods.encode.sweep import Factor, prepare, sweep
from tersely.methods.protocol import Work

Rounding = Literal["nearest", "gptq"]
"""gptq: with the damping, order and least number of tokens that the method of this name has by default."""


def check_choice(name: str, value: str, choices: object) -> None:
    """UsageError where a setting is none of a Literal's choices."""
    known = get_args(choices)
    if value not in known:
        raise UsageError(f"{name}={value!r}: expected {' or '.join(map(repr, known))}")


def check_block(what: str, group: int, columns: int) -> None:
    """UsageError where blocks of `group` do not divide the inputs of a weight."""
    if columns % group:
        raise UsageError(f"{what} has blocks of {group} inputs, which do not divide {columns}; use another method")


def needs_of(rounding: Rounding) -> frozenset[str]:
    return frozenset({"gram"}) if rounding == "gptq" else frozenset()


def work_of(rounding: Rounding, rows: int, columns: int, passes: int) -> Work:
    """passes: times that the fit of the scales reads every element."""
    if rounding == "nearest":
        return Work(passes=1 + passes)
    flops = 2.0 * rows * columns * columns + columns**3 / 3
    return Work(flops=flops, passes=1 + passes, loops=columns)


def round_weight(
    weight_OI: Tensor,
    stats: Statistics,
    rounding: Rounding,
    form: FloatForm,
    fit: Callable[[Tensor | None], tuple[Tensor, Tensor | None]],
) -> Encoded:
    """Fit scales, then round. fit: from the mean square of each input, or None, to the scales and their divisor.

    Where too few tokens were measured for a sweep, or the factorization fails, the note says that the weight was
    rounded to nearest.
    """
    factor, importance, note = None, None, ""
    if rounding == "gptq":
        factor, importance, note = prepare(
            stats, damping=GPTQ.damping, act_order=GPTQ.act_order, minimum_tokens=GPTQ.minimum_tokens
        )
    scale, divisor = fit(importance)
    if factor is None:
        return Encoded((round_to_floats(weight_OI, scale, divisor, form),), note)
    codes = _swept_codes(weight_OI, factor, form.steps(scale, divisor), form, stats.kept_OI)
    return Encoded((Floats(codes, scale, divisor, weight_OI.dtype, form),), note)


def _swept_codes(
    weight_OI: Tensor, factor: Factor, steps_OG: Tensor, form: FloatForm, kept_OI: Tensor | None
) -> Tensor:
    """Codes, (O, I) uint8, of a weight swept with these steps; of zero where `kept_OI` does not hold."""
    rows, columns = weight_OI.shape
    group = columns // steps_OG.shape[1]
    codes_IO = torch.empty((columns, rows), dtype=torch.uint8, device=weight_OI.device)
    steps_GO = steps_OG.t().contiguous()
    kept_IO = None if kept_OI is None else kept_OI.t().float().contiguous()
    element, precision = form.element, form.rounded(weight_OI.dtype)

    def rounded(column: int, target_O: Tensor) -> Tensor:
        step_O = steps_GO[column // group]
        if kept_IO is not None:
            target_O = target_O * kept_IO[column]
        codes_IO[column] = element.encode(target_O / step_O)
        value_O = element.decode(codes_IO[column]).mul_(step_O)
        return value_O.to(precision).to(weight_OI.dtype).float()

    sweep(weight_OI.float(), factor, rounded)
    return codes_IO.t().contiguous()
