"""MoE blocks as users write them, in modules that a Trainer trains."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.runs import FEATURES

EXPERTS, WIDTH = 4, 16


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(FEATURES, WIDTH, bias=False)
        self.w2 = nn.Linear(WIDTH, FEATURES, bias=False)
        self.w3 = nn.Linear(FEATURES, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class ListBlock(nn.Module):
    """In the manner of Mixtral: a list of experts, top-2 of a softmax, renormalised; returns the logits, too."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = 2
        self.gate = nn.Linear(FEATURES, EXPERTS, bias=False)
        self.experts = nn.ModuleList(SwiGLU() for _ in range(EXPERTS))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states.view(-1, hidden_states.shape[-1])
        logits = self.gate(x)
        weights, chosen = logits.softmax(-1, dtype=torch.float32).topk(self.top_k, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, choice = torch.where(chosen == number)
            out.index_add_(0, token, expert(x[token]) * weights[token, choice, None])
        return out.view(hidden_states.shape), logits


class SwitchBlock(nn.Module):
    """In the manner of Switch: top-1, experts with biases, of which each is a sequence of layers."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.router = nn.Linear(FEATURES, EXPERTS)
        last = [nn.Dropout(dropout)] if dropout else []
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, FEATURES), *last)
            for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = chosen == number
            out[mask] = weight[mask].unsqueeze(-1) * expert(x[mask])
        return out


class FusedBlock(nn.Module):
    """Weights of all experts in einsums, scores of a sigmoid, and a shared expert with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(FEATURES, EXPERTS, bias=False)
        self.w_in = nn.Parameter(0.3 * torch.randn(EXPERTS, FEATURES, 2 * WIDTH))
        self.b_in = nn.Parameter(0.3 * torch.randn(EXPERTS, 2 * WIDTH))
        self.w_out = nn.Parameter(0.3 * torch.randn(EXPERTS, WIDTH, FEATURES))
        self.shared = SwiGLU()
        self.shared_gate = nn.Linear(FEATURES, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.sigmoid(self.router(x))
        top, chosen = scores.topk(2, -1)
        weights = torch.zeros_like(scores).scatter(-1, chosen, top)
        up, gate = (torch.einsum("...d,edf->...ef", x, self.w_in) + self.b_in).chunk(2, -1)
        out = torch.einsum("...ef,efd->...ed", F.gelu(gate) * up, self.w_out)
        return torch.einsum("...ed,...e->...d", out, weights) + torch.sigmoid(self.shared_gate(x)) * self.shared(x)


class Odd(nn.Module):
    """An expert that is no network of two or three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.scale = nn.LayerNorm(FEATURES), SwiGLU(), nn.Parameter(torch.ones(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.inner(self.norm(x))


class OddBlock(SwitchBlock):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Odd() for _ in range(EXPERTS))


#: For each block what a user has to say of it.
SAID: dict[str, dict[str, Any]] = {
    "ListBlock": {"router": "gate", "experts": "experts", "top_k": "top_k", "normalize": True},
    "SwitchBlock": {"router": "router", "experts": "experts", "top_k": 1},
    "FusedBlock": {"router": "router", "experts": "", "top_k": 2, "score_function": "sigmoid"}
    | {"shared_expert": "shared", "shared_expert_gate": "shared_gate"},
    "OddBlock": {"router": "router", "experts": "experts", "top_k": 1},
}
BLOCKS: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in (ListBlock, SwitchBlock, FusedBlock, OddBlock)}


class Own(L.LightningModule):
    """A module with two blocks of a user's own, with a loss of the router's logits where they are returned."""

    def __init__(self, kind: str, late: bool = False) -> None:
        super().__init__()
        self.kind = kind
        self.net: Any = None
        if not late:
            self.configure_model()

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(3)
            blocks = [BLOCKS[self.kind]() for _ in range(2)]
            self.net = nn.ModuleDict({"blocks": nn.ModuleList(blocks), "head": nn.Linear(FEATURES, 1)})
            with torch.no_grad():
                for parameter in self.net.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loss = x.new_zeros(())
        for block in self.net["blocks"]:
            out = block(x)
            if isinstance(out, tuple):
                out, logits = out
                loss = loss + 0.1 * logits.logsumexp(-1).square().mean()
            x = x + out
        return self.net["head"](x), loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out, loss = self(batch[0])
        return F.mse_loss(out, batch[1]) + loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.mse_loss(self(batch[0])[0], batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)
