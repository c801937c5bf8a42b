"""Blocks that look like mixtures of experts, and that nobody has said anything of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from lightning_ted.adapters.registry import is_registered
from lightning_ted.moe.expert_parallel import expert_parallel_layers


@dataclass(frozen=True)
class Likeness:
    """One kind of block.

    Attributes:
        name: Qualified, of the first such block.
        kind: Its class.
        router: Path in it of what may be the router.
        experts: Path in it of what may be the experts.

    """

    name: str
    kind: str
    router: str
    experts: str

    def declaration(self) -> str:
        """The lines that would declare it."""
        return (
            f'spec = MoESpec(block="{self.kind}", router="{self.router}", experts="{self.experts}", top_k=2)\n'
            "strategy = TEDStrategy(..., moe_specs=[spec])"
        )


def likenesses(root: nn.Module) -> list[Likeness]:
    """Blocks with a list of alike networks, or weights of three dimensions, beside a linear layer with as many outputs.

    One for each class; blocks whose experts are shared out are none, nor what has an adapter.
    """
    known = [f"{name}." if name else "" for name in expert_parallel_layers(root)]
    found: dict[str, Likeness] = {}
    for name, block in root.named_modules():
        inside = any(f"{name}.".startswith(prefix) or prefix.startswith(f"{name}." if name else "") for prefix in known)
        kind = type(block).__name__
        if inside or kind in found or is_registered(block):
            continue
        routers = {child.out_features: path for path, child in block.named_children() if isinstance(child, nn.Linear)}
        for path, count in _experts_in(block):
            if count in routers:
                found[kind] = Likeness(name, kind, routers[count], path)
                break
    return list(found.values())


def _experts_in(block: nn.Module) -> Iterator[tuple[str, int]]:
    """Paths of what may be experts, and how many these are."""
    for path, child in ("", block), *block.named_children():
        if isinstance(child, nn.ModuleList):
            kinds = {type(expert) for expert in child}
            if len(child) > 1 and len(kinds) == 1 and any(True for _ in child.parameters()):
                yield path, len(child)
            continue
        fused = [p.shape[0] for _, p in child.named_parameters(recurse=False) if p.dim() == 3]
        if len(fused) > 1 and len(set(fused)) == 1 and fused[0] > 1:
            yield path, fused[0]
