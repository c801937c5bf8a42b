"""Tensor parallelism of ordinary modules: what is sent, what is random, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_ted.collectives.recorder import CommRecorder
from lightning_ted.collectives.whole import gather_whole
from lightning_ted.errors import LayoutError, PlanError, UnsupportedError
from lightning_ted.mesh import TEDMesh
from lightning_ted.strategy.partition import PartitionOptions, partition_module
from lightning_ted.tensor_parallel import RowParallelLinear
from lightning_ted.topology import Topology
from tests.support.models import TinyConfig, TinyDecoder
from tests.support.pool import Pools
from tests.support.reduced import reduced

TP2 = Topology(2, tensor=2)


def attention_traffic(sequence: bool) -> dict[tuple[str, str], int]:
    mesh = TEDMesh(TP2)
    model = TinyDecoder(TinyConfig())
    partition_module(model, mesh, PartitionOptions(sequence_parallel=sequence))
    x = torch.randn(2, 6, 16, requires_grad=True)
    with mesh.recording(CommRecorder()) as recorder:
        if sequence:
            model.blocks[0](x)  # enters the region, never leaves it: forward only
        else:
            model.blocks[0].attention(x).sum().backward()
    return dict(recorder.calls)


def test_siblings_share_one_backward_all_reduce(pools: Pools) -> None:
    for calls in pools(2).run(attention_traffic, False):
        assert calls == {("all_reduce", "tensor"): 2}  # one forward, one backward


def test_siblings_share_one_gather_under_sequence_parallelism(pools: Pools) -> None:
    for calls in pools(2).run(attention_traffic, True):
        # One gather and one reduce-scatter for attention, and the same for the feed-forward network.
        assert calls == {("all_gather", "tensor"): 2, ("reduce_scatter", "tensor"): 2}


class Shared(nn.Module):
    """Projections of two different tensors, under grad and not, in turns: none may get another's input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.a, self.b = nn.Linear(8, 8).double(), nn.Linear(8, 8).double()
        self.tp_plan = {"a": "colwise_gather_output", "b": "colwise_gather_output"}

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        first = self.a(x) * self.b(y)
        x = x * 2
        return first + self.a(x) * self.b(x)


def shared_inputs() -> float:
    whole, cut = Shared(), Shared()
    partition_module(cut, TEDMesh(TP2), PartitionOptions())
    worst = 0.0
    for _ in range(2):
        grads = []
        for module in (whole, cut):
            torch.manual_seed(6)
            leaf_x, leaf_y = (torch.randn(3, 8, dtype=torch.double, requires_grad=True) for _ in range(2))
            with torch.no_grad():
                module(leaf_x.clone(), leaf_y)
            module(leaf_x.clone(), leaf_y).square().sum().backward()
            grads.append((leaf_x.grad, leaf_y.grad))
        worst = max(worst, *((a - b).abs().max().item() for a, b in zip(*grads, strict=True)))
    return worst


def test_shared_inputs_are_not_mixed_up(pools: Pools) -> None:
    assert max(pools(2).run(shared_inputs)) < 1e-11


def wrong_plan() -> str:
    mesh = TEDMesh(TP2)
    torch.manual_seed(8)
    model = TinyDecoder(TinyConfig())
    model.tp_plan = {k: v for k, v in model.tp_plan.items() if "_norm" not in k}
    layouts = partition_module(model, mesh, PartitionOptions())
    try:
        with reduced(model, mesh, layouts):
            model.step(torch.arange(16).view(2, 8))[1].backward()
    except PlanError as error:
        return str(error)
    return ""


def test_partial_gradients_of_a_replicated_parameter_are_reported_by_name(pools: Pools) -> None:
    for message in pools(2).run(wrong_plan):
        for layer in (0, 1):
            for norm in ("q_norm", "k_norm"):
                assert f"blocks.{layer}.attention.{norm}.weight" in message
        assert "norm1" not in message and "replicated_with_grad_allreduce" in message


def unseeded(world_layout: Topology, meta: bool) -> tuple[dict[str, Tensor], bool]:
    """Whole weights of a model that every rank initialised differently, or not at all."""
    mesh = TEDMesh(world_layout)
    torch.manual_seed(100 + mesh.rank)
    with torch.device("meta" if meta else "cpu"):
        model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.LayerNorm(8)})
    model.tp_plan = {"a": "colwise", "b": "rowwise"}  # type: ignore[assignment]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layouts = partition_module(model, mesh, PartitionOptions())
    same = all(a is b for a, b in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True))
    return {name: gather_whole(p.detach(), layouts[name], mesh) for name, p in model.named_parameters()}, same


@pytest.mark.parametrize("meta", [False, True], ids=["unseeded", "built on meta"])
def test_initial_weights_come_from_rank_zero_whatever_the_layout(pools: Pools, meta: bool) -> None:
    results = [
        result
        for topology in (Topology(1), Topology(2, 2), Topology(4, 2), Topology(4, 4))
        for result in pools(topology.world_size).run(unseeded, topology, meta)
    ]
    for weights, same in results:
        assert same, "parameters keep their identity"
        for name, weight in weights.items():
            assert torch.equal(weight, results[0][0][name])
    assert results[0][0]["a.weight"].std() > 0.1


def tied() -> tuple[bool, list[int], str]:
    mesh = TEDMesh(TP2)
    model = TinyDecoder(TinyConfig(vocab_parallel=True, tied=True))
    partition_module(model, mesh, PartitionOptions())
    same = model.head.weight is model.embedding.weight
    other = TinyDecoder(TinyConfig(vocab_parallel=True, tied=True))
    del other.tp_plan["head"]
    try:
        partition_module(other, mesh, PartitionOptions())
        message = ""
    except PlanError as error:
        message = str(error)
    return same, list(model.head.weight.shape), message


def test_tied_embeddings_stay_tied_and_are_not_cut_two_ways(pools: Pools) -> None:
    for same, shape, message in pools(2).run(tied):
        assert same and shape == [12, 16]
        assert "'embedding.weight' and 'head.weight' are one tied parameter" in message


def refusals() -> dict[str, str]:
    mesh = TEDMesh(Topology(4, tensor=4))

    def attempt(model: nn.Module, **options: object) -> str:
        try:
            partition_module(model, mesh, PartitionOptions(**options))  # type: ignore[arg-type]
        except (PlanError, LayoutError, UnsupportedError) as error:
            return str(error)
        return ""

    class Odd(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    odd = nn.ModuleDict({"layer": Odd(8, 8)})

    def linear() -> nn.Module:
        return nn.ModuleDict({"layer": nn.Linear(8, 6)})

    shared = nn.Linear(8, 8)
    return {
        "two styles": attempt(
            nn.ModuleDict({"a": shared, "b": shared}), plan={"a": "colwise_gather_output", "b": "rowwise_split_input"}
        ),
        "heads": attempt(TinyDecoder(TinyConfig(heads=2))),
        "width": attempt(linear(), plan={"layer": "colwise"}),
        "forward": attempt(odd, plan={"layer": "colwise"}),
        "pattern": attempt(linear(), plan={"lair": "colwise"}),
        "style": attempt(linear(), plan={"layer": "columns"}),
        "blocks": attempt(linear(), plan={"layer": "packed_colwise:5"}),
        "no stack": attempt(
            nn.ModuleDict({"layer": nn.Linear(8, 8)}), plan={"layer": "colwise"}, sequence_parallel=True
        ),
        "experts": attempt(TinyDecoder(TinyConfig()), plan={"blocks.1.ffn.experts": "colwise"}),
    }


def test_what_does_not_fit_is_refused_by_name(pools: Pools) -> None:
    (messages, *_) = pools(4).run(refusals)
    assert (
        "`tensor_parallel_size=4` does not divide 'blocks.0.attention.num_heads' = 2; choose one of 1, 2"
        in messages["heads"]
    )
    assert "does not divide the width 6 of 'layer'; choose one of 1, 2, 3, 6" in messages["width"]
    assert "fits a torch.nn.Linear itself, not a Odd" in messages["forward"]
    assert "matches no module or parameter; did you mean 'layer'?" in messages["pattern"]
    assert "`tensor_parallel_plan['layer']='columns'` is unknown; choose one of colwise" in messages["style"]
    assert "5 equal blocks do not divide" in messages["blocks"]
    assert "`sequence_parallel=True` found no nn.ModuleList" in messages["no stack"]
    assert "a part of MoE layer 'blocks.1.ffn'" in messages["experts"]
    assert "'a' and 'b' are one and the same" in messages["two styles"]


def losses(smoothing: float, weighted: bool, reduction: str) -> float:
    """Largest difference of loss and gradient from torch's own."""
    torch.manual_seed(9)
    mesh = TEDMesh(TP2)
    weight = torch.rand(12, dtype=torch.double) + 0.5 if weighted else None
    logits = torch.randn(7, 12, dtype=torch.double)
    target = torch.randint(12, (7,))
    target[3] = -100
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    holder = nn.ModuleDict({"loss": nn.CrossEntropyLoss(**options)})  # type: ignore[arg-type]
    partition_module(holder, mesh, PartitionOptions(plan={"loss": "vocab_parallel_loss"}))
    local = logits.chunk(2, -1)[mesh.rank].clone().requires_grad_()
    full = logits.clone().requires_grad_()
    ours, theirs = holder["loss"](local, target), nn.CrossEntropyLoss(**options)(full, target)  # type: ignore[arg-type]
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert local.grad is not None and full.grad is not None
    return max((ours - theirs).abs().max().item(), (local.grad - full.grad.chunk(2, -1)[mesh.rank]).abs().max().item())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_vocabulary_parallel_loss_equals_cross_entropy(
    pools: Pools, smoothing: float, weighted: bool, reduction: str
) -> None:
    assert max(pools(2).run(losses, smoothing, weighted, reduction)) < 1e-10


def copied() -> bool:
    model = TinyDecoder(TinyConfig())
    partition_module(model, TEDMesh(TP2), PartitionOptions())
    tokens = torch.arange(16).view(2, 8)
    model.step(tokens)
    twin = copy.deepcopy(model)
    assert isinstance(twin.blocks[0].attention.o_proj, RowParallelLinear)
    return torch.equal(twin(tokens), model(tokens))


def test_a_cut_module_can_be_copied_and_its_copy_runs(pools: Pools) -> None:
    assert all(pools(2).run(copied))


def padded() -> float:
    mesh = TEDMesh(TP2)
    torch.manual_seed(10)
    whole = nn.Embedding(10, 4, padding_idx=7)
    holder = nn.ModuleDict({"e": copy.deepcopy(whole)})
    layouts = partition_module(holder, mesh, PartitionOptions(plan={"e": "embedding_rowwise"}))
    tokens = torch.tensor([[1, 7, 3], [9, 0, 7]])
    weights = torch.randn(2, 3, 4)
    (whole(tokens) * weights).sum().backward()
    (holder["e"](tokens) * weights).sum().backward()
    grad = gather_whole(holder["e"].weight.grad, layouts["e.weight"], mesh)  # type: ignore[arg-type]
    return (grad - whole.weight.grad).abs().max().item() + (holder["e"](tokens) - whole(tokens)).abs().max().item()


def test_padding_row_of_a_cut_embedding_takes_no_gradient(pools: Pools) -> None:
    assert max(pools(2).run(padded)) == 0


def pair(bias: bool = True) -> nn.ModuleDict:
    torch.manual_seed(11)
    layers = nn.ModuleDict({"up": nn.Linear(8, 8, bias), "down": nn.Linear(8, 8, bias)})
    layers.tp_plan = {"up": "colwise", "down": "rowwise"}  # type: ignore[assignment]
    return layers


def autocast_traffic(sequence: bool) -> tuple[dict[tuple[str, str], int], bool]:
    mesh = TEDMesh(TP2)
    whole = pair()
    blocks = nn.Sequential(nn.Sequential(pair()["up"], pair()["down"]))
    blocks.tp_plan = {"0.0": "colwise", "0.1": "rowwise"}  # type: ignore[assignment]
    partition_module(blocks, mesh, PartitionOptions(sequence_parallel=sequence))
    x = torch.randn(4, 16, 8, requires_grad=True)
    with mesh.recording(CommRecorder()) as recorder, torch.autocast("cpu", torch.bfloat16):
        output = blocks[0][1](blocks[0][0](x)) if not sequence else blocks(x)
        output.float().sum().backward()
        same = output.dtype == whole["down"](whole["up"](x)).dtype
    return dict(recorder.bytes), same


def test_autocast_sends_and_returns_its_own_precision(pools: Pools) -> None:
    numbers = 4 * 16 * 8
    for traffic, same in pools(2).run(autocast_traffic, False):
        assert traffic == {("all_reduce", "tensor"): 2 * numbers * 2}  # 2 bytes, forward and backward; n bytes each
        assert same
    for traffic, same in pools(2).run(autocast_traffic, True):
        # Around each of the two layers half of the tokens, forward and backward, in 2 bytes; the output of the stack in 2, and
        # the gradient of its input in 4.
        half = numbers // 2
        assert traffic == {
            ("all_gather", "tensor"): half * (2 + 2 + 2 + 4),
            ("reduce_scatter", "tensor"): half * (2 + 2),
        }
        assert same


def out_of_range() -> list[str]:
    holder = nn.ModuleDict({"loss": nn.CrossEntropyLoss(), "e": nn.Embedding(12, 4)})
    partition_module(holder, TEDMesh(TP2), PartitionOptions({"loss": "vocab_parallel_loss", "e": "embedding_rowwise"}))
    said = []
    for run in (
        lambda: holder["loss"](torch.zeros(3, 6), torch.tensor([1, 12, -100])),
        lambda: holder["loss"](torch.zeros(3, 6), torch.tensor([1, -1, -100])),
        lambda: holder["e"](torch.tensor([3, 12])),
        lambda: holder["e"](torch.tensor([-3, 0])),
    ):
        try:
            run()
            said.append("")
        except IndexError as error:
            said.append(str(error))
    holder["loss"](torch.zeros(3, 6), torch.tensor([0, 11, -100]))
    holder["e"](torch.tensor([[0, 11]]))
    return said


def test_numbers_out_of_range_are_refused_on_every_rank(pools: Pools) -> None:
    for said in pools(2).run(out_of_range):
        assert said == [
            "class number of `target` 12 is outside [0, 12) and not -100, which is ignored.",
            "class number of `target` -1 is outside [0, 12) and not -100, which is ignored.",
            "token number for the embedding 'e' 12 is outside [0, 12).",
            "token number for the embedding 'e' -3 is outside [0, 12).",
        ]


def grad_modes() -> list[bool]:
    """Whether a sibling without a graph keeps another from its own."""
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        layers = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})
        partition_module(layers, TEDMesh(TP2), PartitionOptions({"q": "colwise", "k": "colwise"}))
        x = torch.randn(2, 4, requires_grad=True)
        with mode():
            layers["k"](x)
        layers["q"](x).sum().backward()
        found.append(x.grad is not None)
    return found


def test_sibling_under_no_grad_does_not_take_the_graph_away(pools: Pools) -> None:
    assert all(pools(2).run(grad_modes)[0])


def one_dimension() -> float:
    whole, layers = pair(), pair()
    partition_module(layers, TEDMesh(TP2), PartitionOptions())
    grads = []
    for module in (whole, layers):
        x = torch.arange(8.0).requires_grad_()
        module["down"](module["up"](x)).square().sum().backward()
        grads.append(x.grad)
    return (grads[0] - grads[1]).abs().max().item() / grads[0].abs().max().item()  # type: ignore[operator, union-attr]


def test_layers_take_a_single_vector(pools: Pools) -> None:
    assert max(pools(2).run(one_dimension)) < 1e-6


def compiled(sequence: bool) -> float:
    """Largest difference of the gradients of a feed-forward network that is compiled as one graph."""
    torch._dynamo.reset()
    torch.manual_seed(12)
    model = TinyDecoder(TinyConfig())
    partition_module(model, TEDMesh(TP2), PartitionOptions(sequence_parallel=sequence))
    block, x = model.blocks[0].ffn, torch.randn(2, 6, 16)
    if sequence:  # as it is inside of the stack
        x, block.gate_proj.region.sequence._length = x[:, :3], 6
    grads = []
    for _ in range(2):
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        block(leaf).square().sum().backward()
        grads.append([leaf.grad, *(parameter.grad for parameter in block.parameters())])
        block.compile(backend="aot_eager", fullgraph=True)
    return max((a - b).abs().max().item() for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("sequence", [False, True])
def test_cut_layers_can_be_compiled_as_one_graph(pools: Pools, sequence: bool) -> None:
    assert max(pools(2).run(compiled, sequence)) < 1e-5
