"""What an optimizer's update of an element depends on, and so how a step may be shared out over ranks and tiles.

Found out by trying: twins of the optimizer step two small matrices whole, in flat pieces and one by one, and the results
are compared. Names would tell only of optimizers that are known here.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ted.optim.stand_ins import StandInStepper, plain_step

UpdateKind = Literal["elementwise", "parameterwise", "coupled", "unknown"]
_Twin = Callable[[list[Parameter]], Optimizer]
_Outcome = dict[str, Tensor]

# The last is beyond the sizes from which on some classes treat a matrix in another way.
_SHAPES = ((4, 6), (5, 3), (130, 132))
# Where the flat matrices are cut, and the tiles of these pieces: the second has a piece of either matrix.
_PIECES = ((1, 9, 14), (8, 7), (5003, 12157))
_PIECE_TILES = (slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7))
_MATRIX_TILES = (slice(0, 1), slice(1, 2), slice(2, 3))
# Gradients of several sizes: one that is large makes a norm that limits updates count.
_GRAD_SIZES = (1e-2, 1.0, 1e2, 1.0, 1e-2, 1e-1, 1.0, 1.0)
# A scheduler may begin with a rate of (nearly) zero, with which nothing would be seen to move.
_MIN_LR = 0.1


def update_kind(optimizer: Optimizer) -> UpdateKind:
    """Try ``optimizer``'s class with its settings, on the CPU, without touching it or the random state.

    Returns:
        The least separable kind among its groups.

        - ``"elementwise"``: stepping 1-D pieces of parameters, tile by tile or on ranks of their own, is stepping the
          parameters, and the state of the pieces is the pieces of the state.
        - ``"parameterwise"``: the same holds of whole parameters in their shape only.
        - ``"coupled"``: parameters influence each other, or so do the calls that make one step.
        - ``"unknown"``: it cannot be tried: it wants a closure, fails on small matrices, or does not move them.

    """
    variants: dict[Any, dict[str, Any]] = {}
    kinds: set[UpdateKind] = set()
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.enable_grad(),
    ):
        warnings.simplefilter("ignore")
        for group in optimizer.param_groups:
            variants.setdefault(_manner(group), group)
        for group in variants.values():
            kinds.add(_kind(lambda parameters, group=group: _twin(optimizer, group, parameters)))  # type: ignore[misc]
    order: tuple[UpdateKind, ...] = ("coupled", "unknown", "parameterwise", "elementwise")
    return next(kind for kind in order if kind in kinds)


def _kind(twin: _Twin) -> UpdateKind:
    generator = torch.Generator().manual_seed(0)

    def random(shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    # Rows of several sizes, so that the norms of parts are not those of the whole.
    start = [random(shape) * torch.logspace(-1, 1, shape[0])[:, None] for shape in _SHAPES]
    slopes = [random(shape) for shape in _SHAPES]
    grads = [[size * (slope + 0.3 * random(slope.shape)) for slope in slopes] for size in _GRAD_SIZES]
    try:
        whole = _stepped(twin, start, grads)
    except Exception:  # whatever a foreign class raises, it cannot be tried
        return "unknown"
    after = [outcome["parameter"] for outcome in whole]
    if not all(tensor.isfinite().all() for tensor in after) or any(map(_close, start, after)):
        return "unknown"
    cut = _outcomes_of_pieces(whole)
    if cut is not None and _separable(twin, _pieces(start), [_pieces(step) for step in grads], _PIECE_TILES, cut):
        return "elementwise"
    return "parameterwise" if _separable(twin, start, grads, _MATRIX_TILES, whole) else "coupled"


def _separable(
    twin: _Twin,
    tensors: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor]],
    tiles: Sequence[slice],
    expected: Sequence[_Outcome],
) -> bool:
    """Whether steps in ``tiles`` give what is ``expected``, and each tensor on a rank that does not see the others does."""
    try:
        outcomes = _stepped(twin, tensors, grads, tiles)
        for index, tensor in enumerate(tensors):
            outcomes += _stepped(twin, [tensor], [[step[index]] for step in grads])
    except Exception:  # such as that of a class that takes only matrices
        return False
    return all(map(_same, outcomes, [*expected, *expected]))


def _stepped(
    twin: _Twin, tensors: Sequence[Tensor], grads: Sequence[Sequence[Tensor]], tiles: Sequence[slice] | None = None
) -> list[_Outcome]:
    """One step with each of ``grads`` by a new optimizer, in one call or in one for each tile."""
    parameters = [Parameter(tensor.clone()) for tensor in tensors]
    optimizer = twin(parameters)
    update = plain_step(type(optimizer))
    for step in grads:
        for parameter, grad in zip(parameters, step, strict=True):
            parameter.grad = grad.clone()
        if tiles is None:
            update(optimizer)
            continue
        stepper = StandInStepper(optimizer, update)
        for tile in tiles:
            stepper.step({0: list(parameters[tile])})
    return [_outcome(optimizer, parameter) for parameter in parameters]


def _outcome(optimizer: Optimizer, parameter: Parameter) -> _Outcome:
    """The parameter, its state, and the numbers in the group, where estimates over all parameters are kept."""
    outcome = {"parameter": parameter.detach()}
    for name, value in optimizer.param_groups[0].items():
        if isinstance(value, (int, float)):
            outcome[f"group {name}"] = torch.tensor(value, dtype=torch.float64)
        elif isinstance(value, Tensor) and value.numel() == 1:
            outcome[f"group {name}"] = value.detach()
    for name, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, (int, float, Tensor)):
            outcome[f"state {name}"] = torch.as_tensor(value).detach()
        elif value is not None:
            outcome[f"state {name}"] = torch.empty(0)  # cannot be looked into, nor cut
    return outcome


def _outcomes_of_pieces(whole: Sequence[_Outcome]) -> list[_Outcome] | None:
    """What the pieces' outcomes have to be: their parts of what has the matrix's shape, and its numbers.

    None if something is neither, so that a rank could not hold its part.
    """
    cut: list[_Outcome] = []
    for outcome, sizes in zip(whole, _PIECES, strict=True):
        shape = outcome["parameter"].shape
        if any(value.shape != shape and value.numel() != 1 for value in outcome.values()):
            return None
        parts = {
            name: value.flatten().split(list(sizes)) if value.shape == shape else [value] * len(sizes)
            for name, value in outcome.items()
        }
        cut += [{name: of_pieces[index] for name, of_pieces in parts.items()} for index in range(len(sizes))]
    return cut


def _pieces(matrices: Iterable[Tensor]) -> list[Tensor]:
    return [
        piece for matrix, sizes in zip(matrices, _PIECES, strict=True) for piece in matrix.flatten().split(list(sizes))
    ]


def _same(left: _Outcome, right: _Outcome) -> bool:
    # Estimates in the group may be tiny as long as few steps have been made.
    return left.keys() == right.keys() and all(
        _close(value, right[name], atol=0.0 if name.startswith("group ") else 1e-7) for name, value in left.items()
    )


def _close(left: Tensor, right: Tensor, atol: float = 1e-7) -> bool:
    # A number may have no dimension or one.
    if left.numel() != right.numel():
        return False
    return torch.allclose(left.flatten(), right.flatten().to(left.dtype), rtol=1e-5, atol=atol, equal_nan=True)


def _twin(optimizer: Optimizer, group: Mapping[str, Any], parameters: list[Parameter]) -> Optimizer:
    """An optimizer like ``optimizer`` with the settings of ``group``, which shares nothing with it.

    Its class makes it, as some classes make their state at once; one that takes other arguments than its settings is
    copied.
    """
    kind, settings = type(optimizer), _settings(group)
    accepted = inspect.signature(kind).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
    try:
        twin = kind(parameters, **{key: value for key, value in settings.items() if anything or key in accepted})
    except Exception:  # whatever a foreign class raises
        twin = object.__new__(kind)
        Optimizer.__init__(twin, parameters, dict(optimizer.defaults))
        # Copies of what it holds, with nothing in place of its parameters: no memory, and no harm.
        memo: dict[int, Any] = {id(p): torch.empty(0) for each in optimizer.param_groups for p in each["params"]}
        memo[id(optimizer)] = twin
        own = {key: value for key, value in vars(optimizer).items() if key not in vars(twin)}
        vars(twin).update(copy.deepcopy(own, memo))
    # Settings may be kept outside of the groups, too.
    vars(twin).update((key, value) for key, value in vars(optimizer).items() if isinstance(value, (int, float, str)))
    twin.param_groups = [{**settings, "params": parameters}]
    if callable(train := getattr(twin, "train", None)):  # schedule-free ones have modes, as modules have
        train()
    return twin


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    settings = {
        key: value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for key, value in group.items()
        if key != "params"
    }
    # Devices' own implementations are the same arithmetic, and want tensors of that device.
    own = {"fused": None, "foreach": None, "capturable": False}
    settings |= {key: value for key, value in own.items() if key in settings}
    lr = settings.get("lr")
    if isinstance(lr, Tensor):
        settings["lr"] = lr.clamp(min=_MIN_LR)
    elif lr is not None:
        settings["lr"] = max(lr, _MIN_LR)
    return settings


def _manner(group: Mapping[str, Any]) -> str:
    """Equal for groups that are stepped in the same manner: of a rate or a factor, only whether it is zero matters."""
    names = sorted(group.keys() - {"params", "name", "lr", "initial_lr"})
    return str([(name, group[name] != 0 if isinstance(group[name], float) else group[name]) for name in names])
