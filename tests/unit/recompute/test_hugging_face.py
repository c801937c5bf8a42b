"""Models that can checkpoint their layers by themselves, as those of Hugging Face: by contract, and by the library itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_ted.moe import MoE, auxiliary_loss
from lightning_ted.recompute import RecomputeOptions, checkpoint_blocks, checkpointed

FULL = RecomputeOptions("full")
TOKENS = torch.linspace(-1, 1, 24).view(3, 8)


class Layer(nn.Module):
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any]

    def __init__(self) -> None:
        super().__init__()
        self.moe = MoE(8, 8, 4, aux_loss_coef=0.1)
        self.runs = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(partial(super().__call__, **kwargs), *args)
        return super().__call__(*args, **kwargs)

    def forward(self, hidden: Tensor, scale: Tensor | None = None, twice: bool = False) -> tuple[Tensor, None]:
        self.runs += 1
        return hidden + self.moe(hidden if scale is None else hidden * scale) * (1 + twice), None


class Model(nn.Module):
    supports_gradient_checkpointing = True
    gradient_checkpointing = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(8, 8)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x, _ = layer(x, scale=torch.full((), 0.5), twice=True)
        return x

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        function = partial(checkpoint, **(gradient_checkpointing_kwargs or {"use_reentrant": True}))
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing, module._gradient_checkpointing_func = True, function


class Wrapper(nn.Module):
    """What a LightningModule is: the model, and blocks of the user's own beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.extra = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8)))

    def forward(self, x: Tensor) -> Tensor:
        return self.extra(self.model(x))


def gradients(module: nn.Module, x: Tensor = TOKENS) -> list[Tensor]:
    return list(torch.autograd.grad(module(x).sum() + auxiliary_loss(module), list(module.parameters())))


def runs(module: Wrapper) -> list[int]:
    for layer in module.model.layers:
        layer.runs = 0
    gradients(module)
    return [layer.runs for layer in module.model.layers]


def is_ours(layer: nn.Module) -> bool:
    function = vars(layer).get("_gradient_checkpointing_func")
    return isinstance(function, partial) and function.func is checkpointed


@pytest.mark.parametrize("before", [None, {}, {"use_reentrant": False}], ids=["off", "reentrant", "not reentrant"])
@pytest.mark.parametrize("names", [None, [Layer]], ids=["found", "named"])
@pytest.mark.parametrize("mode", ["full", "comm_aware"])
def test_a_models_own_layers_are_recomputed_by_our_function(
    mode: Any, names: Any, before: dict[str, Any] | None
) -> None:
    module = Wrapper()
    want = gradients(module)
    if before is not None:
        module.model.gradient_checkpointing_enable(before or None)
    states = [{key: vars(layer).get(key) for key in vars(layer)} for layer in module.model.layers]
    blocks = checkpoint_blocks(module, RecomputeOptions(mode), names)
    assert {"model.layers.0", "model.layers.1"} <= set(blocks)
    assert ("extra.0" in blocks) == (names is None)
    assert all(is_ours(layer) and type(layer) is Layer for layer in module.model.layers)
    assert runs(module) == [2, 2]
    assert all(map(torch.equal, gradients(module), want))

    module.eval()
    for layer in module.model.layers:
        layer.runs = 0
    module(TOKENS).sum().backward()
    assert [layer.runs for layer in module.model.layers] == [1, 1]

    module.train()
    checkpoint_blocks(module, None)
    for layer, state in zip(module.model.layers, states, strict=True):
        after = {key: value for key, value in vars(layer).items() if key in state or "checkpoint" in key}
        assert {**after, "runs": 0, "training": True} == {**state, "runs": 0, "training": True}


def test_a_users_own_checkpointing_is_left_alone() -> None:
    module = Wrapper()
    module.model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpoint_blocks(module, None)
    assert runs(module) == [2, 2] and not any(map(is_ours, module.model.layers))
    # Switched in the meantime: what stands then is the user's last word.
    checkpoint_blocks(module, FULL)
    module.model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpoint_blocks(module, None)
    assert runs(module) == [2, 2] and not any(map(is_ours, module.model.layers))


def test_a_model_whose_switch_does_nothing_is_searched_for_blocks() -> None:
    module = Wrapper()
    module.model.gradient_checkpointing_enable = lambda *_: None  # type: ignore[method-assign]
    assert {"model.layers.0", "model.layers.1", "extra.0", "extra.1"} == set(checkpoint_blocks(module, FULL))
    assert runs(module) == [2, 2]


def test_transformers_layers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).train()
    tokens = torch.arange(8).view(2, 4)

    def loss_gradients() -> list[Tensor]:
        return list(torch.autograd.grad(model(tokens, labels=tokens).loss, list(model.parameters()), allow_unused=True))

    want = loss_gradients()
    blocks = checkpoint_blocks(model, RecomputeOptions("comm_aware"))
    assert {"model.layers.0", "model.layers.1"} <= set(blocks)
    seen: list[int] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(0))
    for got, expected in zip(loss_gradients(), want, strict=True):
        assert (got is None) == (expected is None) and (got is None or torch.equal(got, expected))
    assert len(seen) == 2
