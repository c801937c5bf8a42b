"""What is said of a block of a user's own is proved, and what is wrong is refused by name; what looks like MoE is named."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ted import MoE, MoESpec, TEDStrategy, register_moe_adapter
from lightning_ted.adapters import adopt, likenesses
from lightning_ted.adapters.networks import ListedExperts, NetworkExperts, StackedExperts
from lightning_ted.errors import LayoutError, SpecError, TEDError, UnsupportedError
from lightning_ted.moe.expert_parallel import expert_parallel_layers
from lightning_ted.strategy.checks import refuse_idle_sizes
from lightning_ted.topology import Topology
from tests.support.blocks import BLOCKS, EXPERTS, SAID, WIDTH, FusedBlock, ListBlock, SwitchBlock
from tests.support.runs import FEATURES


def spec(kind: str, **entries: Any) -> MoESpec:
    return MoESpec(block=kind, **{**SAID[kind], **entries})


def around(block: nn.Module) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList([block])})


def tokens() -> Tensor:
    return torch.randn(2, 3, FEATURES, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_an_adopted_block_is_what_it_was(kind: str) -> None:
    torch.manual_seed(0)
    block = BLOCKS[kind]()
    plain, root = copy.deepcopy(block), around(block)
    before = torch.random.get_rng_state()
    adopt(root, [spec(kind)])
    adopt(root, [spec(kind)])  # once is enough
    assert torch.equal(torch.random.get_rng_state(), before)
    (layer,) = expert_parallel_layers(root).values()
    assert type(layer) is (ListedExperts if kind == "OddBlock" else NetworkExperts) and layer.num_experts == EXPERTS
    x = tokens().requires_grad_()
    for module in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        got, want = module(x), plain(x)
        assert isinstance(got, tuple) == isinstance(want, tuple)
        for a, b in zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        (have,) = torch.autograd.grad((got[0] if isinstance(got, tuple) else got).square().sum(), [x])
        (wanted,) = torch.autograd.grad((want[0] if isinstance(want, tuple) else want).square().sum(), [x])
        torch.testing.assert_close(have, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_a_block_without_storage_is_proved_by_a_copy(kind: str) -> None:
    with torch.device("meta"):
        block = BLOCKS[kind]()
    adopt(around(block), [spec(kind)])
    assert all(parameter.is_meta for parameter in block.parameters())


def test_state_dicts_of_the_plain_block_are_read() -> None:
    plain, block = ListBlock(), ListBlock()
    adopt(around(block), [spec("ListBlock")])
    assert isinstance(block.experts, StackedExperts)
    block.load_state_dict(plain.state_dict())
    torch.testing.assert_close(block(tokens()), plain(tokens()))
    with pytest.raises(RuntimeError, match="Unexpected key.*experts.4.w1.weight"):
        block.load_state_dict({**plain.state_dict(), "experts.4.w1.weight": torch.ones(WIDTH, FEATURES)})


def test_dropout_in_experts_stays() -> None:
    block = SwitchBlock(dropout=0.5)
    adopt(around(block), [spec("SwitchBlock")])
    (layer,) = expert_parallel_layers(block).values()
    assert isinstance(layer, ListedExperts)
    assert not torch.equal(block(tokens()), block(tokens()))
    block.eval()
    assert torch.equal(block(tokens()), block(tokens()))


def test_frozen_experts_stay_frozen() -> None:
    block = ListBlock()
    block.experts.requires_grad_(False)
    adopt(around(block), [spec("ListBlock")])
    assert not any(parameter.requires_grad for parameter in block.experts.parameters())


class Square(FusedBlock):
    """All weights are of one shape, so only their product tells which is which."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(EXPERTS, FEATURES, FEATURES))
        self.b_in = nn.Parameter(torch.randn(EXPERTS, FEATURES))
        self.w_out = nn.Parameter(torch.randn(EXPERTS, FEATURES, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.router(x).topk(2, -1)
        weights = torch.zeros(*x.shape[:-1], EXPERTS).scatter(-1, chosen, scores.softmax(-1))
        hidden = F.relu(torch.einsum("...d,efd->...ef", x, self.w_out) + self.b_in).square()
        return torch.einsum("...ef,edf,...e->...d", hidden, self.w_in, weights)


def test_what_shapes_do_not_tell_is_tried_out() -> None:
    block = Square()
    adopt(around(block), [MoESpec("Square", "router", "", 2, scores_of="chosen")])
    (layer,) = expert_parallel_layers(block).values()
    assert isinstance(layer, NetworkExperts) and layer.network.activation == "relu_squared"
    assert layer.network.weights == {"up": "w_out", "down": "w_in"} and not layer.network.transposed


# -- what does not fit -----------------------------------------------------------------------------------------------------


class Noisy(ListBlock):
    def forward(self, hidden_states: Tensor) -> Any:
        if self.training:
            hidden_states = hidden_states * (1 + 0.1 * torch.rand_like(hidden_states))
        return super().forward(hidden_states)


class Losing(ListBlock):
    def forward(self, hidden_states: Tensor) -> Any:
        out, logits = super().forward(hidden_states)
        return out, logits.square().mean()


class Sharing(ListBlock):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(FEATURES, FEATURES)

    def forward(self, hidden_states: Tensor) -> Any:
        return super().forward(hidden_states)[0] + self.shared(hidden_states)


class Scaled(ListBlock):
    def forward(self, hidden_states: Tensor) -> Any:
        return 3 * super().forward(hidden_states)[0]


class Masked(ListBlock):
    def forward(self, hidden_states: Tensor, mask: Tensor) -> Any:
        return super().forward(hidden_states)[0] * mask


class Uneven(ListBlock):
    def __init__(self) -> None:
        super().__init__()
        self.experts[2].w2 = nn.Linear(WIDTH, FEATURES)


@pytest.mark.parametrize(
    ("block", "said", "message"),
    [
        (
            ListBlock,
            {"normalize": False},
            r"This would: score_function='softmax', scores_of='all', normalize=True, top_k=2",
        ),
        (
            SwitchBlock,
            {"score_function": "sigmoid"},
            r"This would: score_function='softmax', scores_of='all', normalize=False, top_k=1",
        ),
        (Sharing, {}, r"Is there a shared expert"),
        (ListBlock, {"router": "gates"}, r"router='gates'\)` names nothing in ListBlock; did you mean 'gate'\?"),
        (ListBlock, {"router": "experts.0.w1"}, r"makes \(10, 16\) of 10 tokens, where logits of 4 experts are wanted"),
        (ListBlock, {"top_k": "k"}, r"top_k='k'\)`: ListBlock has no such attribute"),
        (ListBlock, {"top_k": 5}, r"chooses 5 of 4 experts"),
        (FusedBlock, {"experts": "shared"}, r"holds no weights there that could be two or three layers"),
        (FusedBlock, {"weights": {"up": "w_in", "down": "w_out"}}, r"holds no weights there"),
        (Noisy, {}, r"Noisy does something else in training than in evaluation"),
        (Losing, {}, r"Losing returns 2 values; .*`register_moe_adapter`"),
        (Scaled, {}, r"does not give what Scaled does"),
        (Masked, {}, r"Masked.forward\(tokens .*\) failed \(TypeError.*takes hidden states alone"),
        (Uneven, {}, r"Expert 2 differs from expert 0 in 'w2.bias'"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_what_does_not_fit_is_refused(block: type[nn.Module], said: dict[str, Any], message: str) -> None:
    torch.manual_seed(0)
    known = next(kind for kind in (block.__name__, *(base.__name__ for base in block.__mro__)) if kind in SAID)
    with pytest.raises(SpecError, match=f"(?s){message}"):
        adopt(around(block()), [MoESpec(block=block.__name__, **{**SAID[known], **said})])


def test_a_spec_that_fits_nothing_is_refused_once_all_is_there() -> None:
    adopt(around(ListBlock()), [spec("ListBlock", block="ListBlok")] if False else [], complete=True)
    with pytest.raises(
        SpecError, match=r"`MoESpec\(block='ListBlok'\)` fits no module of ModuleDict; did you mean 'ListBlock'\?"
    ):
        adopt(around(ListBlock()), [MoESpec(block="ListBlok", **SAID["ListBlock"])])
    adopt(around(ListBlock()), [MoESpec(block="ListBlok", **SAID["ListBlock"])], complete=False)


def test_blocks_are_named_by_patterns_too() -> None:
    root = nn.ModuleDict({"a": nn.ModuleList([ListBlock(), ListBlock()]), "b": ListBlock()})
    adopt(root, [MoESpec(block="a.*", **SAID["ListBlock"])])
    assert sorted(expert_parallel_layers(root)) == ["a.0.experts", "a.1.experts"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"block": ""}, "block=''"),
        ({"router": 3}, "router=3"),
        ({"experts": None}, "experts=None"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": True}, "top_k=True"),
        ({"score_function": "tanh"}, "score_function='tanh'"),
        ({"scores_of": "some"}, "scores_of='some'"),
        ({"shared_expert_gate": "x"}, "name the `shared_expert`"),
        ({"weights": {"w1": "up"}}, "must have the roles"),
    ],
)
def test_wrong_entries_are_refused(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        MoESpec(**{"block": "A", "router": "r", "experts": "e", "top_k": 1, **entries})  # type: ignore[arg-type]


def test_the_strategy_takes_specs_alone() -> None:
    with pytest.raises(UnsupportedError, match="`moe_specs=.*a list of `MoESpec` or None"):
        TEDStrategy(moe_specs=[{"block": "A"}])  # type: ignore[list-item]


# -- adapters --------------------------------------------------------------------------------------------------------------


class Mine(SwitchBlock):
    pass


class Bare(SwitchBlock):
    pass


@pytest.mark.parametrize("by_name", [False, True])
def test_adapters_are_called_once_for_each_block(by_name: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_ted.adapters import registry

    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))
    calls = []

    @register_moe_adapter(f"{__name__}.Mine" if by_name else Mine)
    def adapt(block: Mine) -> nn.Module:
        calls.append(block)
        return MoE(FEATURES, WIDTH, EXPERTS)

    root = nn.ModuleDict({"a": Mine(), "b": Bare()})
    adopt(root)
    adopt(root)
    assert len(calls) == 1 and isinstance(root["a"], MoE) and type(root["b"]) is Bare
    register_moe_adapter(Bare, lambda block: None)
    with pytest.raises(UnsupportedError, match="The adapter of Bare leaves no `ExpertParallelLayer` in 'b'"):
        adopt(root)
    with pytest.raises(UnsupportedError, match="must be a class of modules"):
        register_moe_adapter(3, lambda block: None)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="cannot replace the LightningModule itself"):
        adopt(Mine())


# -- likenesses ------------------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Nothing of this is a mixture."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.head = nn.Linear(8, 3)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 2, enable_nested_tensor=False)
        self.moe = MoE(8, 8, 4)


def test_what_looks_like_a_mixture_is_named_and_nothing_else() -> None:
    root = nn.ModuleDict({"a": ListBlock(), "b": ListBlock(), "c": FusedBlock(), "d": Deep()})
    found = {likeness.kind: likeness for likeness in likenesses(root)}
    assert set(found) == {"ListBlock", "FusedBlock"} and found["ListBlock"].name == "a"
    assert 'MoESpec(block="ListBlock", router="gate", experts="experts"' in found["ListBlock"].declaration()
    assert 'MoESpec(block="FusedBlock", router="router", experts=""' in found["FusedBlock"].declaration()
    adopt(root, [spec("ListBlock"), spec("FusedBlock")])
    assert not likenesses(root)


def test_errors_are_of_this_package() -> None:
    assert issubclass(SpecError, TEDError)


def test_sizes_without_a_layer_say_what_looks_like_one() -> None:
    with pytest.raises(
        LayoutError, match=r"(?s)finds no MoE layer.*'layers.0' looks like one:.*MoESpec\(block=\"ListBlock\""
    ):
        refuse_idle_sizes(around(ListBlock()), {}, Topology(2, 1, 2, 1), None, False)
