"""What a user says of a MoE block of their own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from torch import nn

from lightning_ted.errors import SpecError

#: The roles that weights can have in an expert: those of a network with a gate, with both of its first layers in one, and without.
ROLES = ({"gate", "up", "down"}, {"gate_up", "down"}, {"up", "down"})


@dataclass(frozen=True)
class MoESpec:
    """Where in a block its router and its experts are, and how it routes: enough to share out its experts.

    What is not said here is found out: which of an expert's weights is which, how they lie, the activation, what the block returns.
    What comes of it is compared with what the block itself makes of random tokens, and refused if it differs.

    Attributes:
        block: The name of the block's class, or a pattern of qualified names, in which ``*`` stands for one segment of them.
        router: Path in the block of what maps ``[T, D]`` to logits ``[T, E]`` (or to a tuple that begins with these).
        experts: Path of an ``nn.ModuleList`` of experts, or of the module that holds the weights of all experts in parameters
            ``[E, ...]``; ``""`` is the block itself.
        top_k: To how many experts a token goes, or the block's attribute that tells.
        score_function: What makes scores of logits.
        scores_of: ``"all"``: the scores are those of all experts, of which the highest are taken; ``"chosen"``: of the chosen ones'
            logits alone.
        normalize: Whether the chosen scores are divided by their sum.
        shared_expert: Path of a network that sees all tokens, and whose output is added.
        shared_expert_gate: Path of a layer whose sigmoid scales that output.
        weights: Of fused weights, the parameters' names in the module that holds them, by their roles: ``gate``, ``up`` and
            ``down``, or ``gate_up`` and ``down``, or ``up`` and ``down``. None finds out.
        activation: Its name in ``torch.nn.functional``. None finds out.

    Raises:
        SpecError: If an entry is none of these.

    """

    block: str
    router: str
    experts: str
    top_k: int | str
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    scores_of: Literal["all", "chosen"] = "all"
    normalize: bool = False
    shared_expert: str | None = None
    shared_expert_gate: str | None = None
    weights: dict[str, str] | None = field(default=None, hash=False)
    activation: str | None = None

    def __post_init__(self) -> None:
        for name in ("block", "router"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise SpecError(f"`MoESpec({name}={getattr(self, name)!r})` must be a name.")
        if not isinstance(self.experts, str):
            raise SpecError(f"`MoESpec(experts={self.experts!r})` must be a path, or '' for the block itself.")
        whole = isinstance(self.top_k, int) and not isinstance(self.top_k, bool) and self.top_k > 0
        if not whole and not (isinstance(self.top_k, str) and self.top_k):
            raise SpecError(
                f"`MoESpec(top_k={self.top_k!r})` must be a positive number, or the name of the block's attribute."
            )
        for name, choices in (("score_function", ("softmax", "sigmoid")), ("scores_of", ("all", "chosen"))):
            if getattr(self, name) not in choices:
                raise SpecError(
                    f"`MoESpec({name}={getattr(self, name)!r})` must be one of {', '.join(map(repr, choices))}."
                )
        if self.shared_expert_gate is not None and self.shared_expert is None:
            raise SpecError(
                f"`MoESpec(shared_expert_gate={self.shared_expert_gate!r})` has nothing to scale; name the `shared_expert`."
            )
        if self.weights is not None and set(self.weights) not in ROLES:
            kinds = "; ".join(", ".join(sorted(roles)) for roles in ROLES)
            raise SpecError(f"`MoESpec(weights={self.weights!r})` must have the roles {kinds}.")

    def matches(self, name: str, module: nn.Module) -> bool:
        """Whether this speaks of a module of this qualified name."""
        pattern = re.escape(self.block).replace(r"\*", r"[^.]+")
        return type(module).__name__ == self.block or re.fullmatch(pattern, name) is not None

    def find(self, block: nn.Module, path: str, what: str) -> Any:
        """What is at a path in a block.

        Raises:
            SpecError: If there is nothing.

        """
        try:
            return block.get_submodule(path)
        except AttributeError:
            names = [name for name, _ in block.named_modules() if name]
            close = get_close_matches(path, names, n=1, cutoff=0.3)
            hint = f"did you mean '{close[0]}'?" if close else f"it has {', '.join(map(repr, names[:8]))}."
            raise SpecError(
                f"`MoESpec(block={self.block!r}, {what}={path!r})` names nothing in {type(block).__name__}; {hint}"
            ) from None

    def top_k_of(self, block: nn.Module) -> int:
        """To how many experts a token goes in this block.

        Raises:
            SpecError: If the block does not tell.

        """
        value = self.top_k if isinstance(self.top_k, int) else getattr(block, self.top_k, None)
        if not isinstance(value, int) or value < 1:
            raise SpecError(
                f"`MoESpec(block={self.block!r}, top_k={self.top_k!r})`: {type(block).__name__} has no such attribute with a "
                "positive whole number."
            )
        return value


def require_matches(specs: Sequence[MoESpec], root: nn.Module) -> None:
    """See that every spec speaks of something.

    Raises:
        SpecError: Naming one that does not.

    """
    for spec in specs:
        if not any(spec.matches(name, module) for name, module in root.named_modules()):
            kinds = {type(module).__name__ for module in root.modules()}
            close = get_close_matches(spec.block, kinds, n=1, cutoff=0.3)
            hint = f"; did you mean '{close[0]}'?" if close else "."
            raise SpecError(f"`MoESpec(block={spec.block!r})` fits no module of {type(root).__name__}{hint}")
