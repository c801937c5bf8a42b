"""An optimizer's state, of parameters and of the segments that they are stepped in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_ted.errors import CheckpointError
from lightning_ted.optim.segments import Segment

State = defaultdict[Any, Any]


def segments_of(segments: Iterable[Segment]) -> dict[Parameter, list[Segment]]:
    """Segments by parameter, in order."""
    found: dict[Parameter, list[Segment]] = defaultdict(list)
    for segment in segments:
        found[segment.parameter].append(segment)
    return {parameter: sorted(own, key=lambda segment: segment.piece.start) for parameter, own in found.items()}


def owned_state(state: State, segments: Iterable[Segment]) -> State:
    """State by parameter: of each tensor with an entry for every element, those that this rank owns, ``[owned]``."""
    result: State = defaultdict(dict)
    masters: set[Parameter] = set()
    for parameter, own in segments_of(segments).items():
        masters.update(segment.master for segment in own)
        filed = [state[segment.master] for segment in own if segment.master in state]
        if len(filed) < len(own):
            continue  # never stepped
        for key, value in filed[0].items():
            if all(is_per_element(e.get(key), segment.size) for e, segment in zip(filed, own, strict=True)):
                parts = [entries[key].reshape(-1) for entries in filed]
                result[parameter][key] = parts[0] if len(parts) == 1 else torch.cat(parts)
            else:
                result[parameter][key] = value
    result.update((key, value) for key, value in state.items() if key not in masters)
    return result


def load_pieces(
    into: State,
    state: Mapping[Parameter, Mapping[str, Any]],
    segments: Iterable[Segment],
    shared: Container[Parameter],
    counted_on_device: Container[Parameter] = (),
) -> None:
    """File the state of parameters under their segments; of those that are not shared out, under themselves.

    Args:
        into: Where it is filed.
        state: By parameter, with tensors of its (local) shape or of this rank's elements.
        segments: This rank's segments.
        shared: Parameters that are shared out: of one that this rank owns nothing of, nothing is filed.
        counted_on_device: Parameters whose ``step`` is to be on their device, in fp32, as torch has it where it is fused.

    Raises:
        CheckpointError: If a tensor fits neither.

    """
    by_parameter = segments_of(segments)
    for parameter, entries in state.items():
        own = by_parameter.get(parameter)
        if own is None:
            if parameter not in shared:
                into[parameter] = dict(entries)
            continue
        owned = sum(segment.size for segment in own)
        at = 0
        for segment in own:
            into[segment.master] = {
                key: _part(key, value, segment, parameter.numel(), owned, at) for key, value in entries.items()
            }
            step = into[segment.master].get("step")
            if parameter in counted_on_device and isinstance(step, Tensor):
                into[segment.master]["step"] = step.to(segment.bucket.device, torch.float32)
            at += segment.size


def is_per_element(value: Any, elements: int) -> bool:
    """Whether a state has an entry for each of a parameter's elements, rather than one for all of them."""
    return isinstance(value, Tensor) and value.numel() == elements and value.dim() > 0


def _part(key: str, value: Any, segment: Segment, whole: int, owned: int, at: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.numel() == whole and value.dim() > 0:
        at = segment.piece.start
    elif segment.whole or value.numel() == 1:
        # Of no element in particular. Counts of steps are read on the host, unless they are told to be elsewhere.
        return value.clone() if key == "step" else value.to(segment.bucket.device, copy=True)
    elif value.numel() != owned:
        raise CheckpointError(
            f"The optimizer's state '{key}' of {value.numel()} elements does not fit a parameter of which this rank holds {whole} "
            f"and owns {owned}."
        )
    part = value.reshape(-1)[at : at + segment.size]
    dtype = segment.master.dtype if value.is_floating_point() else None
    return segment.shaped(part).to(segment.state_device, dtype, copy=True)
