"""Which modules are recomputed, and that they stay the modules that they were."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

from lightning_ted.errors import UnsupportedError
from lightning_ted.moe import MoE, auxiliary_loss
from lightning_ted.recompute import RecomputeOptions, checkpoint_blocks
from lightning_ted.recompute.regions import BlockNames, find_blocks

FULL = RecomputeOptions("full")


class Block(nn.Module):
    """A block that counts its forwards."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x + self.linear(x).tanh()


class Other(Block):
    pass


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Stack(Block(), Block())
        self.decoder = nn.Sequential(nn.Linear(4, 4), Other(), Other(), nn.LayerNorm(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class ManyExperts(nn.Module):
    """A block whose experts are a list of equal modules, too."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        return sum((expert(x) for expert in self.experts), torch.zeros(()))


def runs(model: nn.Module) -> list[int]:
    """How often each block has run after one forward and backward."""
    model(torch.ones(2, 4)).sum().backward()
    return [module.runs for module in model.modules() if isinstance(module, Block)]


@pytest.mark.parametrize(
    ("model", "names", "found"),
    [
        (lambda: Stack(Block(), Block()), None, ["layers.0", "layers.1"]),
        (lambda: nn.Sequential(Block(), nn.ReLU(), Block()), None, ["0", "2"]),
        (EncoderDecoder, None, ["encoder.layers.0", "encoder.layers.1", "decoder.1", "decoder.2"]),
        (lambda: Stack(ManyExperts(), ManyExperts()), None, ["layers.0", "layers.1"]),
        (lambda: Stack(Block(), Other(), Block()), None, ["layers.0", "layers.2"]),
        (lambda: Stack(*[Block()] * 2), None, ["layers.0"]),
        (EncoderDecoder, [Other], ["decoder.1", "decoder.2"]),
        (EncoderDecoder, ["Other"], ["decoder.1", "decoder.2"]),
        (EncoderDecoder, {f"{__name__}.Other"}, ["decoder.1", "decoder.2"]),
        (EncoderDecoder, ["Block"], ["encoder.layers.0", "encoder.layers.1", "decoder.1", "decoder.2"]),
        (EncoderDecoder, [Stack, "Linear"], ["encoder", *(f"{b}.linear" for b in find_blocks(EncoderDecoder())), "decoder.0"]),
    ],
    ids=["list", "sequential", "two stacks", "experts", "mixed", "tied", "class", "name", "full name", "base", "nested"],
)  # fmt: skip
def test_blocks_are_found_or_named(model: Any, names: BlockNames | None, found: list[str]) -> None:
    module = model()
    assert set(checkpoint_blocks(module, FULL, names)) == set(found)
    for name, child in module.named_modules():
        assert isinstance(child.__dict__.get("_ted_recompute"), RecomputeOptions) == (name in found)


def test_what_has_been_found_runs_again_in_backward() -> None:
    model = EncoderDecoder()
    assert runs(model) == [1, 1, 1, 1]
    checkpoint_blocks(model, FULL, ["Other"])
    assert runs(model) == [2, 2, 3, 3]


def test_moe_layers_of_a_model_without_a_stack_can_be_named() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = MoE(8, 8, 4)

    with pytest.raises(
        UnsupportedError, match=r"`activation_checkpointing='full'` finds no .* in One; name the classes"
    ):
        checkpoint_blocks(One(), FULL)
    assert checkpoint_blocks(One(), FULL, ["MoE"]) == ["moe"]


def test_names_that_match_nothing_are_refused() -> None:
    message = "policy` names 'Decoder', but EncoderDecoder holds no .*; .* classes Block, Other, Sequential, Stack.$"
    with pytest.raises(UnsupportedError, match=message):
        checkpoint_blocks(EncoderDecoder(), FULL, ["Block", "Decoder"])


def test_a_block_stays_what_it_was() -> None:
    model = EncoderDecoder()
    before = {name: (type(m).__name__, type(m).__qualname__, type(m).__module__) for name, m in model.named_modules()}
    keys, text = list(model.state_dict()), repr(model)
    checkpoint_blocks(model, FULL)
    after = {name: (type(m).__name__, type(m).__qualname__, type(m).__module__) for name, m in model.named_modules()}
    assert (after, list(model.state_dict()), repr(model)) == (before, keys, text)
    assert isinstance(model.decoder[1], Other) and type(model.encoder.layers[0]) is type(model.encoder.layers[1])
    checkpoint_blocks(model, None)
    assert type(model.decoder[1]) is Other and vars(model.decoder[1]).keys() == vars(Other()).keys()
    assert runs(model) == [1, 1, 1, 1]


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, saved, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_recomputed_as_well(copied: Any) -> None:
    model = EncoderDecoder()
    checkpoint_blocks(model, FULL)
    other = copied(model)
    assert runs(other) == [2, 2, 2, 2]
    assert type(other.decoder[1]) is type(model.decoder[1])
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    checkpoint_blocks(other, None)
    assert type(other.decoder[1]) is Other


def test_a_block_with_a_state_of_its_own_can_be_copied_between_forward_and_backward() -> None:
    model = nn.Sequential(MoE(8, 8, 4), MoE(8, 8, 4))
    checkpoint_blocks(model, FULL, [MoE])
    loss = model(torch.ones(3, 8)).sum() + auxiliary_loss(model)
    assert copy.deepcopy(model)[0].statistics is None
    loss.backward()


def test_the_mode_can_be_changed() -> None:
    model = Stack(Block(), Block())
    for options in (FULL, RecomputeOptions("comm_aware"), FULL):
        checkpoint_blocks(model, options)
        assert [vars(block)["_ted_recompute"] for block in model.layers] == [options] * 2
        assert type(model.layers[0]).__mro__[1] is Block
    checkpoint_blocks(model, FULL, ["Linear"])
    assert type(model.layers[0]) is Block
    assert runs(model) == [1, 1]


def test_hooks_of_a_block_run_with_it() -> None:
    model, seen = Stack(Block(), Block()), []
    model.layers[0].register_forward_pre_hook(lambda module, args: seen.append("before") or (args[0] * 2,))
    model.layers[0].register_forward_hook(lambda module, args, output: seen.append("after") or output.exp())
    x = torch.ones(2, 4)
    want = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    checkpoint_blocks(model, FULL)
    seen.clear()
    got = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    assert all(map(torch.equal, got, want))
    assert seen[:3] == ["before", "after", "before"]


def test_a_tied_block_is_recomputed_each_time() -> None:
    model = Stack(*[Block()] * 3)
    checkpoint_blocks(model, FULL)
    assert runs(model) == [6]
    checkpoint_blocks(model, None)
    assert type(model.layers[2]) is Block


def test_parametrizations_may_be_put_on_and_taken_off() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    weight_norm(model[0])
    checkpoint_blocks(model, FULL, ["Linear"])
    weight_norm(model[1])
    model(torch.ones(2, 4)).sum().backward()
    checkpoint_blocks(model, None)
    model(torch.ones(2, 4)).sum().backward()
    checkpoint_blocks(model, FULL, ["Linear"])
    remove_parametrizations(model[1], "weight")
    checkpoint_blocks(model, None)
    remove_parametrizations(model[0], "weight")
    assert [type(layer).__name__ for layer in model] == ["Linear", "Linear"]
    model(torch.ones(2, 4)).sum().backward()


def test_a_class_that_is_never_called_is_no_block() -> None:
    with pytest.raises(UnsupportedError, match="names 'ModuleList', but EncoderDecoder holds no module of that class"):
        checkpoint_blocks(EncoderDecoder(), FULL, ["ModuleList"])


def test_a_base_that_registers_its_children_is_not_told_of_any() -> None:
    known: list[str] = []

    class Registering(nn.Module):
        def __init_subclass__(cls, **arguments: Any) -> None:
            known.append(cls.__name__)

    class Registered(Registering):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    model = nn.Sequential(Registered(), Registered())
    assert checkpoint_blocks(model, FULL) == ["0", "1"]
    model(torch.ones(2, 4)).sum().backward()
    assert known == ["Registered"]


def test_blocks_are_found_in_a_dict_and_by_one_name() -> None:
    model = nn.ModuleDict({"a": Block(), "b": Block(), "head": nn.Linear(4, 1)})
    assert checkpoint_blocks(model, FULL) == ["a", "b"]
    assert checkpoint_blocks(model, FULL, "Linear") == ["a.linear", "b.linear", "head"]
