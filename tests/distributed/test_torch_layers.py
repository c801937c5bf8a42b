"""torch's own transformer layers, cut with no plan of the user's, compute what one process computes."""

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
from lightning_ted.mesh import TEDMesh
from lightning_ted.moe import MoE
from lightning_ted.strategy.partition import PartitionOptions, partition_module
from lightning_ted.topology import Topology
from tests.support.pool import Pools
from tests.support.runs import assert_close as assert_weights_close
from tests.support.runs import assert_same_everywhere, trainer, whole_weights
from tests.support.stacks import TP2
from tests.support.torch_layers import (
    HEADS,
    OUTPUTS,
    E,
    Holder,
    N,
    S,
    T,
    assert_close,
    away,
    decoder,
    differences,
    encoder,
    outputs_of,
    padding,
    per_head,
    perturbed,
    tensors,
    triangle,
)


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
    "encoder layer": (encoder, [(S, N, E)], {"src_key_padding_mask": padding()}),
    "norm first": (lambda: encoder(norm_first=True, activation="gelu"), [(S, N, E)], {"src_mask": triangle(S)}),
    "no bias": (lambda: encoder(bias=False, batch_first=True, activation=F.silu), [(N, S, E)], {}),
    "own function": (lambda: encoder(activation=tanh_of_half, batch_first=True), [(N, S, E)], {}),
    "activation that mixes": (lambda: encoder(activation=nn.Softmax(-1)), [(S, N, E)], {}),
    "activation that learns": (lambda: encoder(activation=nn.PReLU()), [(S, N, E)], {}),
    "decoder layer": (
        decoder,
        [(T, N, E), (S, N, E)],
        {"tgt_mask": triangle(T), "tgt_is_causal": True, "memory_key_padding_mask": padding()},
    ),
    "decoder layer, norm first": (
        lambda: decoder(norm_first=True, batch_first=True),
        [(N, T, E), (N, S, E)],
        {"memory_mask": per_head()},
    ),
    "encoder": (lambda: _stacked(encoder(batch_first=True)), [(N, S, E)], {"src_key_padding_mask": padding()}),
    "decoder": (lambda: _stacked(decoder()), [(T, N, E), (S, N, E)], {"tgt_mask": triangle(T)}),
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
        "layer": (encoder(batch_first=True), {}),
        "layer, mask": (encoder(batch_first=True, activation="gelu"), {"src_mask": triangle(S)}),
        "encoder": (_stacked(encoder(batch_first=True)), {}),
        "encoder, padding": (_stacked(encoder(batch_first=True)), {"src_key_padding_mask": padding()}),
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
        self.encoder = encoder(batch_first=True)
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


# -- plans of the user's, and layers that come later ------------------------------------------------------------------------


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
            whole = perturbed(encoder(batch_first=True)).train(training)
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


def in_parts() -> tuple[list[float], list[bool]]:
    """Layers that are built after others have been cut, and a copy of all: differences, and whether each is cut."""
    torch.manual_seed(1)
    mesh, options = TEDMesh(TP2), PartitionOptions()
    whole = nn.Sequential(perturbed(encoder(batch_first=True)).layer, perturbed(encoder(batch_first=True)).layer)
    cut = nn.Sequential(copy.deepcopy(whole[0]))
    partition_module(cut, mesh, options, complete=False)
    cut.append(copy.deepcopy(whole[1]))
    layouts = partition_module(cut, mesh, options)
    twin = copy.deepcopy(cut)
    (x,) = tensors((N, S, E))
    found = []
    for training in (True, False):
        for module in (cut, twin):
            with torch.set_grad_enabled(training):
                found.append(away(module.train(training)(x), whole.train(training)(x)))
    return found, [bool(layouts[f"{i}.self_attn.in_proj_weight"].cuts) for i in range(2)]


def test_layers_may_be_built_later_and_copied(pools: Pools) -> None:
    for found, cut in pools(2).run(in_parts):
        assert max(found) < OUTPUTS and cut == [True, True]
