"""torch's own attention and transformer layers, cut with no plan of the user's, compute what one process computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ted import TEDStrategy
from lightning_ted.collectives.recorder import CommRecorder
from lightning_ted.errors import PlanError, UnsupportedError
from lightning_ted.mesh import TEDMesh
from lightning_ted.moe import MoE
from lightning_ted.strategy.partition import PartitionOptions, partition_module
from lightning_ted.tensor_parallel.attention import HeadParallelAttention
from lightning_ted.topology import Topology
from tests.support.pool import Pools
from tests.support.reduced import reduced
from tests.support.runs import assert_close as assert_weights_close
from tests.support.runs import assert_same_everywhere, trainer, whole_weights
from tests.support.stacks import TP2

E, HEADS, N, T, S = 16, 4, 2, 5, 6
#: Relative to the norm of what is compared.
OUTPUTS, GRADIENTS = 1e-6, 1e-5


class Holder(nn.Module):
    """A model whose ``layer`` is called as a case says."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


def perturbed(layer: nn.Module) -> Holder:
    """With biases and norms that are not what they are initialised to."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return Holder(layer)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def outputs_of(output: Any) -> list[Tensor]:
    return [x for x in (output if isinstance(output, tuple) else (output,)) if x is not None]


def away(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()


def differences(
    layer: nn.Module,
    inputs: list[Tensor],
    call: Callable[[nn.Module, list[Tensor]], Any],
    topology: Topology,
    options: PartitionOptions | None = None,
) -> tuple[float, float]:
    """Of outputs, and of the gradients of every parameter and input: the largest relative difference from one process."""
    whole = perturbed(layer)
    cut = copy.deepcopy(whole)
    mesh = TEDMesh(topology)
    layouts = partition_module(cut, mesh, options or PartitionOptions())
    assert any(layout.cuts for layout in layouts.values())
    leaves = [[x.clone().requires_grad_() for x in inputs] for _ in range(2)]

    def loss(outputs: list[Tensor]) -> Tensor:
        weights = tensors(*(tuple(x.shape) for x in outputs))
        return sum(((x * w).sum() + x.square().sum() for x, w in zip(outputs, weights, strict=True)), torch.zeros(()))

    theirs = outputs_of(call(whole, leaves[0]))
    loss(theirs).backward()
    with reduced(cut, mesh, layouts, options) as gradients:
        ours = outputs_of(call(cut, leaves[1]))
        loss(ours).backward()
    expected = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    pairs = [(gradients[name], expected[name]) for name in expected]
    pairs += [(b.grad, a.grad) for a, b in zip(*leaves, strict=True) if a.grad is not None]  # type: ignore[misc]
    return max(map(away, ours, theirs)), max(away(ours, theirs) for ours, theirs in pairs)


# -- attention -------------------------------------------------------------------------------------------------------------


def triangle(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def padding() -> Tensor:
    return torch.tensor([[False] * (S - 2) + [True] * 2, [False] * S])


def per_head(targets: int = T, samples: int = N) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(samples * HEADS, targets, S, generator=generator) < 0.3


#: Options of the module, of the call, and which inputs are given: "self", "cross" or "kv" (keys that are not the values).
Case = tuple[dict[str, Any], dict[str, Any], str]
ATTENTION: dict[str, Case] = {
    "plain": ({}, {}, "self"),
    "no bias": ({"bias": False}, {}, "self"),
    "batch first": ({"batch_first": True}, {}, "self"),
    "no weights": ({"batch_first": True}, {"need_weights": False}, "self"),
    "weights of each head": ({}, {"average_attn_weights": False}, "cross"),
    "weights of each head, batch first": ({"batch_first": True}, {"average_attn_weights": False}, "cross"),
    "cross": ({}, {"need_weights": False}, "cross"),
    "other values": ({"batch_first": True}, {}, "kv"),
    "separate": ({"kdim": 6, "vdim": 10}, {}, "kv"),
    "separate without bias": ({"kdim": 6, "vdim": 10, "bias": False}, {"need_weights": False}, "kv"),
    "padding": ({}, {"key_padding_mask": padding()}, "cross"),
    "padding, no weights": ({"batch_first": True}, {"key_padding_mask": padding(), "need_weights": False}, "cross"),
    "mask": ({}, {"attn_mask": triangle(T)}, "self"),
    "mask of each head": ({}, {"attn_mask": per_head()}, "cross"),
    "mask of each head, no weights": ({}, {"attn_mask": per_head(), "need_weights": False}, "cross"),
    "both masks": (
        {"batch_first": True},
        {"attn_mask": per_head(), "key_padding_mask": padding(), "need_weights": False},
        "cross",
    ),
    "causal": ({"batch_first": True}, {"attn_mask": triangle(T), "is_causal": True, "need_weights": False}, "self"),
    "causal with weights": ({}, {"attn_mask": triangle(T), "is_causal": True}, "self"),
    "causal with padding": (
        {},
        {
            "attn_mask": triangle(S),
            "is_causal": True,
            "key_padding_mask": padding(),
            "need_weights": False,
        },
        "long",
    ),
    "extra keys": (
        {"add_bias_kv": True, "add_zero_attn": True},
        {"attn_mask": per_head(), "key_padding_mask": padding()},
        "cross",
    ),
    "extra keys, no weights": (
        {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
        {"attn_mask": per_head(), "need_weights": False},
        "cross",
    ),
    "unbatched": ({}, {}, "flat"),
    "unbatched, masks": (
        {"batch_first": True},
        {"attn_mask": per_head(samples=1), "key_padding_mask": padding()[0], "average_attn_weights": False},
        "flat",
    ),
}


def attention_inputs(module: dict[str, Any], which: str) -> list[Tensor]:
    keys, values = module.get("kdim", E), module.get("vdim", E)
    if which == "flat":
        return tensors((T, E), (S, keys), (S, values))
    shapes = [(T, N, E), (S, N, keys), (S, N, values)]
    if which == "long":
        shapes = [(S, N, E)]
    if module.get("batch_first"):
        shapes = [(n, length, width) for length, n, width in shapes]
    return tensors(*shapes[: {"self": 1, "long": 1, "cross": 2}.get(which, 3)])


def attention_cases() -> dict[str, tuple[float, float]]:
    found = {}
    for name, (module, options, which) in ATTENTION.items():
        torch.manual_seed(1)

        def call(model: nn.Module, inputs: list[Tensor], options: dict[str, Any] = options) -> Any:
            query, key, value = [*inputs, *inputs[-1:] * (3 - len(inputs))]
            return model(query, key, value, **options)

        layer = nn.MultiheadAttention(E, HEADS, **module)
        found[name] = differences(layer, attention_inputs(module, which), call, TP2)
    return found


def assert_close(found: dict[str, tuple[float, float]]) -> None:
    for name, (outputs, gradients) in found.items():
        assert outputs < OUTPUTS and gradients < GRADIENTS, f"{name}: {outputs:.1e} {gradients:.1e}"


def test_attention_gives_what_one_process_gives(pools: Pools) -> None:
    for found in pools(2).run(attention_cases):
        assert found.keys() == ATTENTION.keys()
        assert_close(found)


def learned_masks() -> dict[str, tuple[float, float]]:
    """Masks that are added to scores are inputs with gradients."""
    found = {}
    for name, shape in {"of all heads": (T, S), "of each head": (N * HEADS, T, S)}.items():
        for need_weights in (False, True):

            def call(model: nn.Module, inputs: list[Tensor], need_weights: bool = need_weights) -> Any:
                query, memory, mask, padded = inputs
                return model(query, memory, memory, attn_mask=mask, key_padding_mask=padded, need_weights=need_weights)

            torch.manual_seed(1)
            inputs = tensors((T, N, E), (S, N, E), shape, (N, S))
            found[f"{name}, {need_weights}"] = differences(nn.MultiheadAttention(E, HEADS), inputs, call, TP2)
    return found


def test_learned_masks_get_the_gradient_of_all_heads(pools: Pools) -> None:
    for found in pools(2).run(learned_masks):
        assert_close(found)


def traffic() -> dict[tuple[str, str], int]:
    mesh = TEDMesh(TP2)
    model = Holder(nn.MultiheadAttention(E, HEADS))
    partition_module(model, mesh, PartitionOptions())
    (x,) = tensors((T, N, E))
    x.requires_grad_()
    with mesh.recording(CommRecorder()) as recorder:
        model(x, x, x, need_weights=False)[0].sum().backward()
    return dict(recorder.calls)


def test_one_tensor_as_query_key_and_value_is_handed_over_once(pools: Pools) -> None:
    for calls in pools(2).run(traffic):
        assert calls == {("all_reduce", "tensor"): 2}  # one forward, one backward


def dropped() -> tuple[float, list[bool], list[bool], float]:
    """Share of weights that dropout drops, where, the zeros of a layer's output, and a number drawn after all."""
    mesh = TEDMesh(TP2)
    torch.manual_seed(6)
    model = Holder(nn.MultiheadAttention(E, HEADS, dropout=0.4))
    partition_module(model, mesh, PartitionOptions())
    (x,) = tensors((30, 8, E))
    _, weights = model(x, x, x, average_attn_weights=False)
    own = weights.chunk(2, 1)[mesh.rank] == 0
    layer = Holder(nn.TransformerEncoderLayer(E, HEADS, 32, dropout=0.4, norm_first=True))
    with torch.no_grad():  # what is left is the dropout of what the layer adds
        layer.layer.linear2.weight.zero_()
        layer.layer.linear2.bias.fill_(1)
        layer.layer.self_attn.out_proj.weight.zero_()
        layer.layer.self_attn.out_proj.bias.fill_(10)
    partition_module(layer, mesh, PartitionOptions())
    added = (layer(x) - x).round().flatten()
    model.eval()
    _, kept = model(x, x, x, average_attn_weights=False)
    assert (kept > 0).all(), "nothing is dropped in evaluation"
    model.train()
    with pytest.raises(ValueError, match="where \\(30, 30\\) is wanted"):
        model(x, x, x, attn_mask=torch.zeros(30, 1))  # ends before the output projection
    return own.double().mean().item(), own.flatten().tolist(), added.tolist(), torch.rand(1).item()


def test_dropout_differs_between_heads_and_agrees_on_replicated_tensors(pools: Pools) -> None:
    (share, own, added, after), (other_share, others, other_added, other_after) = pools(2).run(dropped)
    # 4 heads / 2 x 8 samples x 30 x 30: three standard deviations are 0.012
    assert abs(share - 0.4) < 0.012 and abs(other_share - 0.4) < 0.012
    agreeing = sum(a == b for a, b in zip(own, others, strict=True)) / len(own)
    assert abs(agreeing - (0.4**2 + 0.6**2)) < 0.012, "ranks draw independently"
    assert added == other_added and len(set(added)) == 4  # neither, either or both are dropped
    assert after == other_after, "the common stream goes on the same"


# -- transformer layers ----------------------------------------------------------------------------------------------------


def _encoder(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(E, HEADS, 32, dropout=0.0, **options)


def _decoder(**options: Any) -> nn.Module:
    return nn.TransformerDecoderLayer(E, HEADS, 32, dropout=0.0, **options)


def _stacked(layer: nn.Module, **options: Any) -> nn.Module:
    if isinstance(layer, nn.TransformerDecoderLayer):
        return nn.TransformerDecoder(layer, 2, nn.LayerNorm(E))
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(E), **options)


def _transformer(**options: Any) -> nn.Module:
    return nn.Transformer(E, HEADS, 2, 2, 32, dropout=0.0, **options)


def tanh_of_half(x: Tensor) -> Tensor:
    return torch.tanh(x / 2)


#: How to build the layer, of what shapes its inputs are, and options of the call.
LAYERS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]], dict[str, Any]]] = {
    "encoder layer": (_encoder, [(S, N, E)], {"src_key_padding_mask": padding()}),
    "norm first": (lambda: _encoder(norm_first=True, activation="gelu"), [(S, N, E)], {"src_mask": triangle(S)}),
    "no bias": (lambda: _encoder(bias=False, batch_first=True, activation=F.silu), [(N, S, E)], {}),
    "own function": (lambda: _encoder(activation=tanh_of_half, batch_first=True), [(N, S, E)], {}),
    "activation that mixes": (lambda: _encoder(activation=nn.Softmax(-1)), [(S, N, E)], {}),
    "activation that learns": (lambda: _encoder(activation=nn.PReLU()), [(S, N, E)], {}),
    "decoder layer": (
        _decoder,
        [(T, N, E), (S, N, E)],
        {"tgt_mask": triangle(T), "tgt_is_causal": True, "memory_key_padding_mask": padding()},
    ),
    "decoder layer, norm first": (
        lambda: _decoder(norm_first=True, batch_first=True),
        [(N, T, E), (N, S, E)],
        {"memory_mask": per_head()},
    ),
    "encoder": (lambda: _stacked(_encoder(batch_first=True)), [(N, S, E)], {"src_key_padding_mask": padding()}),
    "decoder": (lambda: _stacked(_decoder()), [(T, N, E), (S, N, E)], {"tgt_mask": triangle(T)}),
    "transformer": (
        lambda: _transformer(batch_first=True),
        [(N, S, E), (N, T, E)],
        {"src_key_padding_mask": padding(), "tgt_mask": triangle(T), "memory_key_padding_mask": padding()},
    ),
}
#: Feed-forward networks of these stay whole.
WHOLE = {"activation that mixes", "activation that learns"}
STACKS = ["encoder", "decoder", "transformer"]


def layer_cases(names: list[str], options: PartitionOptions) -> dict[str, tuple[float, float]]:
    found = {}
    for name in names:
        build, shapes, given = LAYERS[name]
        torch.manual_seed(1)
        layer = build()

        def call(model: nn.Module, inputs: list[Tensor], given: dict[str, Any] = given) -> Any:
            return model(*inputs, **given)

        found[name] = differences(layer, tensors(*shapes), call, TP2, options)
    return found


def test_layers_give_what_one_process_gives(pools: Pools) -> None:
    for found in pools(2).run(layer_cases, list(LAYERS), PartitionOptions()):
        assert_close(found)


def test_stacks_of_layers_may_split_their_tokens(pools: Pools) -> None:
    for found in pools(2).run(layer_cases, STACKS, PartitionOptions(sequence_parallel=True)):
        assert_close(found)


def parts() -> dict[str, set[str]]:
    """Which parameters of each layer are cut."""
    found = {}
    for name, (build, _, _) in LAYERS.items():
        holder = Holder(build())
        layouts = partition_module(holder, TEDMesh(TP2), PartitionOptions())
        found[name] = {parameter for parameter, layout in layouts.items() if layout.cuts}
    return found


ATTENTION_PARTS = {"in_proj_weight", "in_proj_bias", "out_proj.weight"}
FEED_FORWARD = {"linear1.weight", "linear1.bias", "linear2.weight"}


def test_all_that_can_be_cut_is_cut_and_nothing_else(pools: Pools) -> None:
    (found, _) = pools(2).run(parts)
    attention = {f"layer.self_attn.{leaf}" for leaf in ATTENTION_PARTS}
    assert found["encoder layer"] == attention | {f"layer.{leaf}" for leaf in FEED_FORWARD}
    assert {name for name, cut in found.items() if cut == attention} == WHOLE
    assert len(found["decoder layer"]) == 9 and len(found["transformer"]) == 2 * 6 + 2 * 9


def evaluations() -> dict[str, float]:
    """The largest relative difference from one process, which uses the fused kernels and nested tensors."""
    found = {}
    cases: dict[str, tuple[nn.Module, dict[str, Any]]] = {
        "layer": (_encoder(batch_first=True), {}),
        "layer, mask": (_encoder(batch_first=True, activation="gelu"), {"src_mask": triangle(S)}),
        "encoder": (_stacked(_encoder(batch_first=True)), {}),
        "encoder, padding": (_stacked(_encoder(batch_first=True)), {"src_key_padding_mask": padding()}),
        "transformer": (
            _transformer(batch_first=True),
            {"src_key_padding_mask": padding(), "memory_key_padding_mask": padding()},
        ),
        "attention": (nn.MultiheadAttention(E, HEADS, batch_first=True), {}),
    }
    seen = ~padding()  # where one process pads, it fills in zeros
    for name, (layer, options) in cases.items():
        whole = perturbed(layer).eval()
        cut = copy.deepcopy(whole)
        partition_module(cut, TEDMesh(TP2), PartitionOptions())
        (x,) = tensors((N, S, E))
        inputs = [x] * {"transformer": 2, "attention": 3}.get(name, 1)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                theirs, ours = (outputs_of(model(*inputs, **options)) for model in (whole, cut))
            if name == "encoder, padding":
                assert (theirs[0][~seen] == whole.layer.norm.bias).all(), "one process has used nested tensors"
                theirs, ours = [theirs[0][seen]], [ours[0][seen]]
            found[f"{name}, {mode.__name__}"] = max(map(away, ours, theirs))
    return found


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_evaluation_does_not_bypass_the_cut_layers(pools: Pools) -> None:
    for found in pools(2).run(evaluations):
        assert len(found) == 12
        for name, difference in found.items():
            assert difference < OUTPUTS, f"{name}: {difference:.1e}"


# -- with other layers, and in runs ----------------------------------------------------------------------------------------


class Sparse(nn.Module):
    """An encoder layer, attention whose three inputs differ, and a MoE layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = _encoder(batch_first=True)
        self.cross = nn.MultiheadAttention(E, HEADS, batch_first=True)
        self.moe = MoE(E, 32, 4, top_k=2)
        self.head = nn.Linear(E, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        x = x + self.cross(x, x.roll(1, 1), x)[0]
        return self.head(x + self.moe(x))


def beside_moe() -> dict[str, tuple[float, float]]:
    found = {}
    for name, topology in {
        "tp2 ep2": Topology(4, tensor=2, expert=2, expert_tensor=2),
        "folded": Topology(4, tensor=2, expert=4, expert_tensor=1),
        "tp4": Topology(4, tensor=4, expert=1, expert_tensor=4),
    }.items():
        torch.manual_seed(1)

        def call(model: nn.Module, inputs: list[Tensor]) -> Any:
            return model(*inputs)

        found[name] = differences(Sparse(), tensors((N, S, E)), call, topology)
    return found


def test_layers_beside_a_moe_layer(pools: Pools) -> None:
    for found in pools(4).run(beside_moe):
        assert_close(found)


class Encoding(L.LightningModule):
    """As a user would write it: no plan."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(7)
        layer = nn.TransformerEncoderLayer(E, HEADS, 32, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(E, 1)

    def _loss(self, batch: Tensor) -> Tensor:
        found = self.head(self.encoder(batch, src_key_padding_mask=padding().repeat(2, 1)))
        return (found[:, : S - 2] - batch[:, : S - 2].mean(-1, keepdim=True).sin()).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _samples() -> DataLoader:
    return DataLoader(tensors((16, S, E))[0], batch_size=4)  # type: ignore[arg-type]


def _fit(layout: str, epochs: int, read: str | None, write: str | None) -> tuple[dict[str, Tensor], float]:
    """Weights, and the loss of an evaluation."""
    run = trainer(layout, max_epochs=epochs, use_distributed_sampler=False)
    run.fit(model := Encoding(), _samples(), ckpt_path=read)
    if write is not None:
        run.save_checkpoint(write)
    weights = whole_weights(run)
    (metrics,) = run.validate(model, _samples(), verbose=False)
    return weights, metrics["val_loss"]


def test_runs_go_on_from_checkpoints_of_another_layout(pools: Pools, tmp_path: Path) -> None:
    by_one, by_two = str(tmp_path / "one.ckpt"), str(tmp_path / "two.ckpt")
    pools(1).run(_fit, "one", 1, None, by_one)
    pools(2).run(_fit, "tp2", 1, None, by_two)
    ((expected, loss),) = pools(1).run(_fit, "one", 2, None, None)
    first, second = pools(2).run(_fit, "tp2", 2, by_one, None)
    results = [first, second, *pools(1).run(_fit, "tp1", 2, by_two, None)]
    assert_same_everywhere([first[0], second[0]])
    for weights, found in results:
        assert_weights_close(weights, expected, 1e-6)
        assert abs(found - loss) < 1e-6 * loss


def _recomputed(mode: str | None) -> dict[str, Tensor]:
    strategy = TEDStrategy(tensor_parallel_size=2, activation_checkpointing=mode)
    run = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2,
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(Encoding(dropout=0.3), _samples())
    return whole_weights(run)


def test_recomputing_torchs_layers_changes_no_bit(pools: Pools) -> None:
    plain, full, aware = (pools(2).run(_recomputed, mode)[0] for mode in (None, "full", "comm_aware"))
    assert_same_everywhere([plain, full, aware])


# -- plans of the user's, and what is refused ------------------------------------------------------------------------------


class Post(nn.TransformerEncoderLayer):
    """A layer with a forward of its own, to which nested tensors and fused kernels do not belong."""

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(src) * 2


def explicit() -> dict[str, tuple[float, float]]:
    found = {}
    plans: dict[str, dict[str, str]] = {
        "attention": {"layer.self_attn": "multihead_attention"},
        "feed forward": {"layer.linear1": "colwise", "layer.linear2": "rowwise"},
        "one": {"layer.linear1": "colwise_gather_output"},
    }
    for name, plan in plans.items():
        for training in (True, False):
            whole = perturbed(_encoder(batch_first=True)).train(training)
            cut = copy.deepcopy(whole)
            layouts = partition_module(cut, TEDMesh(TP2), PartitionOptions(plan))
            cuts = {parameter.rpartition(".")[0] for parameter, layout in layouts.items() if layout.cuts}
            assert all(any(f"{c}.".startswith(f"{named}.") for named in plan) for c in cuts), "exactly the user's plan"
            (x,) = tensors((N, S, E))
            with torch.set_grad_enabled(training):
                found[f"{name}, {training}"] = (away(cut(x), whole(x)), 0.0)
    torch.manual_seed(1)
    found["subclass"] = differences(Post(E, HEADS, 32, 0.0), tensors((S, N, E)), lambda model, x: model(*x), TP2)
    return found


def test_a_plan_of_the_users_own_is_kept_and_fused_kernels_stay_out(pools: Pools) -> None:
    for found in pools(2).run(explicit):
        assert len(found) == 7
        assert_close(found)


class Block(nn.Module):
    def __init__(self, masked: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, HEADS)
        self.mask = nn.Parameter(torch.zeros(S, S)) if masked else None

    def forward(self, x: Tensor) -> Tensor:
        other = x if self.mask is not None else x + 1
        return x + self.attention(x, other, other, attn_mask=self.mask)[0]


def refusals() -> dict[str, str]:
    attention = Holder(nn.MultiheadAttention(E, HEADS))
    partition_module(attention, TEDMesh(TP2), PartitionOptions())
    assert isinstance(attention.layer, HeadParallelAttention) and attention.layer.num_heads == HEADS
    split = PartitionOptions(sequence_parallel=True)
    stacks = [nn.Sequential(Block(masked), Block(masked)) for masked in (False, True)]
    for stack in stacks:
        partition_module(stack, TEDMesh(TP2), split)
    (x,) = tensors((S, N, E))
    nested = torch.nested.nested_tensor([x[:, 0], x[:4, 1]])
    attempts: dict[str, Callable[[], Any]] = {
        "mask": lambda: attention(x, x, x, attn_mask=torch.zeros(S, S - 1)),
        "mask of each head": lambda: attention(x, x, x, attn_mask=torch.zeros(N * HEADS // 2, S, S)),
        "padding": lambda: attention(x, x, x, key_padding_mask=torch.zeros(S, N)),
        "dtype": lambda: attention(x, x, x, attn_mask=torch.zeros(S, S, dtype=torch.int64)),
        "causal": lambda: attention(x, x, x, is_causal=True),
        "dimensions": lambda: attention(x[0, 0], x, x),
        "nested": lambda: attention(nested, nested, nested),
        "cross": lambda: stacks[0](x),
        "learned": lambda: stacks[1](x),
        "subclass": lambda: partition_module(
            Holder(type("Own", (nn.MultiheadAttention,), {})(E, HEADS)),
            TEDMesh(TP2),
            PartitionOptions({"layer": "multihead_attention"}),
        ),
        "parameter": lambda: partition_module(
            Holder(nn.MultiheadAttention(E, HEADS)), TEDMesh(TP2), PartitionOptions({"layer.in_proj_weight": "colwise"})
        ),
    }
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            said[name] = ""
        except (ValueError, UnsupportedError, PlanError) as error:
            said[name] = str(error)
    return said


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_what_cut_attention_does_not_take_is_refused_by_name(pools: Pools) -> None:
    for said in pools(2).run(refusals):
        assert said["mask"] == "`attn_mask` has the shape (6, 5), where (6, 6) is wanted."
        assert said["mask of each head"] == "`attn_mask` has the shape (4, 6, 6), where (8, 6, 6) is wanted."
        assert said["padding"] == "`key_padding_mask` has the shape (6, 2), where (2, 6) is wanted."
        assert said["dtype"] == "`attn_mask` must be of bool or of a floating-point dtype, not torch.int64."
        assert "`is_causal=True` is a hint about `attn_mask`, which is None" in said["causal"]
        assert "must all have 3 dimensions, or 2 without a batch, not 1, 3 and 3" in said["dimensions"]
        assert "takes no nested tensors" in said["nested"]
        assert "only with one tensor as `query`, `key` and `value`" in said["cross"]
        assert "a mask in '' requires a gradient" in said["learned"]
        assert "fits a torch.nn.MultiheadAttention itself, not a Own" in said["subclass"]
        assert "is a parameter, which the style 'colwise' does not fit; name its module" in said["parameter"]
