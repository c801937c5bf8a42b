"""Numbers of classes and tokens have to be in range, as torch itself demands of one process."""

from __future__ import annotations

import torch
from torch import Tensor


def require_range(numbers: Tensor, size: int, what: str, ignored: int | None = None) -> None:
    """Refuse numbers outside ``[0, size)``, which would otherwise be no rank's and give garbage or zeros.

    Every tensor rank sees the same numbers, so all of them raise. On an accelerator the check is made there, without
    waiting for it.

    Args:
        numbers: Class or token numbers.
        size: How many there are over all ranks.
        what: What the numbers are, for the message.
        ignored: One number that is allowed besides.

    Raises:
        IndexError: On CPU; on CUDA a device-side assertion fails.

    """
    inside = (numbers >= 0) & (numbers < size)
    if ignored is not None:
        inside |= numbers == ignored
    rule = f"outside [0, {size})" + ("" if ignored is None else f" and not {ignored}, which is ignored")
    if numbers.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(inside.all(), f"a {what} is {rule}.")
    elif not inside.all():
        raise IndexError(f"{what} {int(numbers[~inside][0])} is {rule}.")
