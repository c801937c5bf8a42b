"""Modules parallelized by torch's `parallelize_module`, as for Lightning's ModelParallelStrategy, against one process."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    parallelize_module,
)
from torch.utils.data import DataLoader, DistributedSampler

from examples.model_parallel_port.train import Decoder, LitDecoder, loader, main, parallelize
from lightning_ted import TEDStrategy
from lightning_ted.collectives.whole import gather_whole
from lightning_ted.errors import LayoutError, PlanError, UnsupportedError
from lightning_ted.mesh import TEDMesh
from lightning_ted.moe import MoE
from lightning_ted.strategy.partition import PartitionOptions, partition_module
from lightning_ted.topology import Topology
from tests.support.pool import Pools
from tests.support.reduced import training_of
from tests.support.runs import assert_close, assert_same_everywhere, trainer, whole_weights

TP2 = Topology(2, tensor=2)
TP2_DP2 = Topology(4, tensor=2)
TP2_EP2 = Topology(4, tensor=2, expert=2)
IDS = torch.arange(4 * 9).view(4, 9) * 7 % 32


def _decoder(moe: bool = False) -> Decoder:
    torch.manual_seed(3)
    model = Decoder()
    if moe:
        model.layers[1].feed_forward = MoE(16, 32, 4, top_k=2, aux_loss_coef=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def _parallelize_beside_experts(model: Decoder, mesh: Any) -> None:
    """The MoE layer takes and gives plain tensors of all tokens."""
    experts, model.layers[1].feed_forward = model.layers[1].feed_forward, nn.Module()
    for name in ("w1", "w2", "w3"):
        model.layers[1].feed_forward.register_module(name, nn.Linear(16, 16))
    parallelize(model, mesh)
    model.layers[1].feed_forward = experts
    gather = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), use_local_output=True)
    scatter = PrepareModuleOutput(output_layouts=(Replicate(),), desired_output_layouts=(Shard(1),))
    parallelize_module(experts, mesh, gather)
    parallelize_module(experts, mesh, scatter)


def _gradients(topology: Topology, sequence: bool, moe: bool) -> tuple[float, dict[str, Tensor], float, bool]:
    """The mean loss, whole gradients by name, and their norm; rank 0's values are those that count."""
    mesh = TEDMesh(topology)
    model = _decoder(moe)
    if mesh.rank:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
    tensor_mesh = mesh.dense["tensor_parallel"]
    if moe:
        _parallelize_beside_experts(model, tensor_mesh)
    else:
        parallelize(model, tensor_mesh, sequence)
    layouts = partition_module(model, mesh, PartitionOptions())
    plain = not any(isinstance(p, DTensor) for p in model.parameters())
    shard = IDS.chunk(topology.data)[mesh.axis("data").rank]
    training = training_of(model, mesh, layouts)
    with training.backward():
        loss = _loss(model, shard)
        loss.backward()
    gradients = {name: training.full_gradient(name) for name, _ in model.named_parameters()}
    norm = float(training.grad_norm())
    training.close()
    return loss.item(), {name: g.clone() for name, g in gradients.items() if g is not None}, norm, plain


@pytest.mark.parametrize("topology", [TP2, TP2_DP2], ids=["tp2", "tp2dp2"])
@pytest.mark.parametrize("sequence", [False, True], ids=["replicated", "sequence"])
def test_gradients_and_norm_are_those_of_one_process(pools: Pools, topology: Topology, sequence: bool) -> None:
    _check_gradients(pools, topology, sequence, moe=False)


def test_experts_work_beside_parallelized_modules(pools: Pools) -> None:
    _check_gradients(pools, TP2_EP2, True, moe=True)


def _check_gradients(pools: Pools, topology: Topology, sequence: bool, moe: bool) -> None:
    model = _decoder(moe)
    want = _loss(model, IDS)
    want.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    results = pools(topology.world_size).run(_gradients, topology, sequence, moe)
    assert abs(sum(loss for loss, *_ in results) / len(results) - want.item()) < 1e-6
    for _, got, got_norm, plain in results:
        assert plain and got.keys() == gradients.keys()
        for name, gradient in gradients.items():
            error = (got[name] - gradient).norm() / gradient.norm().clamp(min=1e-3)
            assert error < 1e-5, f"{name}: {error}"
        assert abs(got_norm - norm) < 1e-5 * norm


def _fit(name: str, sequence: bool, folder: Path | None = None) -> dict[str, Any]:
    """Four clipped steps, or two and two with a checkpoint between them; then the other stages."""
    options = {"gradient_clip_val": 0.05, "use_distributed_sampler": False}
    module, run = LitDecoder(sequence), trainer(name, max_steps=4, **options)
    size = 1 if name == "one" else dist.get_world_size() // 2
    ids = loader().dataset
    # In order, where Lightning's own sampler would shuffle them.
    sampler = DistributedSampler(ids, size, dist.get_rank() // 2, shuffle=False)
    batches = DataLoader(ids, batch_size=4 // size, sampler=sampler)
    if folder is not None:
        first = trainer(name, max_steps=2, **options)
        first.fit(LitDecoder(sequence), batches)
        first.save_checkpoint(folder / f"half of {name}")
    run.fit(module, batches, ckpt_path=folder and folder / f"half of {name}")
    weights = whole_weights(run)
    loss = run.validate(module, batches, verbose=False)[0]["val_loss"]
    assert run.test(module, batches, verbose=False)[0]["val_loss"] == loss
    run.predict(module, batches)
    return {"weights": weights, "loss": loss}


@pytest.mark.parametrize(
    ("name", "world_size", "sequence", "resumed"),
    [("tp2", 2, True, True), ("tp2 file", 2, False, True), ("tp2", 4, True, False)],
    ids=["tp2 directory", "tp2 file", "tp2dp2"],
)
def test_clipped_and_resumed_runs_are_those_of_one_process(
    pools: Pools, tmp_path: Path, name: str, world_size: int, sequence: bool, resumed: bool
) -> None:
    (want,) = pools(1).run(_fit, "one", sequence, tmp_path if resumed else None)
    results = pools(world_size).run(_fit, name, sequence, tmp_path if resumed else None)
    assert_same_everywhere([result["weights"] for result in results])
    assert_close(results[0]["weights"], want["weights"], 1e-6)
    assert abs(results[0]["loss"] - want["loss"]) < 1e-6


def _read(folder: Path) -> tuple[float, float]:
    run = trainer("tp2", max_steps=2)
    run.fit(module := LitDecoder(), loader())
    run.save_checkpoint(folder / "tp2")
    loss = run.validate(module, loader(), verbose=False)[0]["val_loss"]
    other = trainer("tp2 file")
    return loss, other.validate(LitDecoder(), loader(), ckpt_path=folder / "tp2", verbose=False)[0]["val_loss"]


def test_a_checkpoint_of_one_run_is_read_by_another(pools: Pools, tmp_path: Path) -> None:
    for loss, read in pools(2).run(_read, tmp_path):
        assert loss == read


def _copies() -> tuple[float, float, bool]:
    mesh = TEDMesh(TP2)
    model = _decoder()
    parallelize(model, mesh.dense["tensor_parallel"])
    partition_module(model, mesh, PartitionOptions())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    reads = isinstance(twin.output.weight, DTensor) and twin.output.weight.requires_grad
    same = torch.equal(twin.output.weight.to_local(), 2 * model.output.weight.to_local())
    whole = _loss(_decoder(), IDS).item()
    queries, keys = model.layers[0].attention.wq, twin.layers[1].attention.wk
    alike = isinstance(queries, nn.Linear) and type(queries) is type(keys)  # blocks are found by their classes
    return _loss(model, IDS).item(), whole, reads and same and alike


def test_a_copy_reads_its_own_parameters(pools: Pools) -> None:
    for loss, want, works in pools(2).run(_copies):
        assert abs(loss - want) < 1e-6 and works


def _tied() -> tuple[bool, float, float]:
    mesh = TEDMesh(TP2)
    model, whole = _decoder(), _decoder()
    whole.output.weight = whole.tok_embeddings.weight
    parallelize(model, mesh.dense["tensor_parallel"])
    model.output.weight = model.tok_embeddings.weight
    layouts = partition_module(model, mesh, PartitionOptions())
    same = model.output._parameters["weight"] is model.tok_embeddings._parameters["weight"]
    _loss(whole, IDS).backward()
    training = training_of(model, mesh, layouts)
    with training.backward():
        loss = _loss(model, IDS)
        loss.backward()
    want, got = whole.output.weight.grad, training.full_gradient("tok_embeddings.weight")
    assert want is not None and got is not None
    error = float((got - want).norm() / want.norm())
    training.close()
    return same, abs(loss.item() - _loss(whole, IDS).item()), error


def test_tied_parameters_stay_tied(pools: Pools) -> None:
    for same, loss, gradient in pools(2).run(_tied):
        assert same and loss < 1e-6 and gradient < 1e-5


def _from_meta(parallel: bool) -> dict[str, Tensor]:
    mesh = TEDMesh(TP2)
    torch.manual_seed(5)
    with torch.device("meta"):
        model = Decoder()
    if parallel:
        parallelize(model, mesh.dense["tensor_parallel"])
    layouts = partition_module(model, mesh, PartitionOptions())
    return {name: gather_whole(p.detach(), layouts[name], mesh) for name, p in model.named_parameters()}


def test_weights_of_a_model_built_without_storage_do_not_depend_on_who_cuts_it(pools: Pools) -> None:
    plain, *_ = pools(2).run(_from_meta, False)
    for weights in pools(2).run(_from_meta, True):
        assert_close(weights, plain, 0.0)


def _pair() -> nn.ModuleDict:
    torch.manual_seed(1)
    return nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 6)})


def _sharded_again(mesh: TEDMesh) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return nn.ModuleDict({"a": fully_shard(nn.Linear(8, 8), mesh=mesh.dense["data_parallel"])})


def _with_placement(placement: Any, device_mesh: Callable[[TEDMesh], Any]) -> Callable[[TEDMesh], nn.Module]:
    def make(mesh: TEDMesh) -> nn.Module:
        module, on = _pair(), device_mesh(mesh)
        if isinstance(placement, Partial):
            tensor = DTensor.from_local(module["a"].weight.detach(), on, [placement] * on.ndim)
        else:
            tensor = distribute_tensor(module["a"].weight.detach(), on, [placement] * on.ndim)
        module["a"].weight = nn.Parameter(tensor)
        return module

    return make


def _uneven(mesh: TEDMesh) -> nn.Module:
    module = nn.ModuleDict({"a": nn.Linear(8, 7)})
    parallelize_module(module["a"], mesh.dense["tensor_parallel"], ColwiseParallel())
    return module


def _planned_too(mesh: TEDMesh) -> nn.Module:
    module = _pair()
    parallelize_module(module["a"], mesh.dense["tensor_parallel"], ColwiseParallel())
    module.tp_plan = {"a": "colwise", "b": "rowwise"}  # type: ignore[assignment]
    return module


def _twice(mesh: TEDMesh) -> nn.Module:
    module = _pair()
    for _ in range(2):
        partition_module(module, mesh, PartitionOptions())
        whole = module["a"]._parameters["weight"].detach()
        module["a"].weight = nn.Parameter(distribute_tensor(whole, mesh.dense["tensor_parallel"], [Shard(0)]))
    return module


def _expert_weights(mesh: TEDMesh) -> nn.Module:
    module = nn.ModuleDict({"moe": MoE(8, 16, 4)})
    experts = module["moe"].experts
    weight = distribute_tensor(experts.down_proj.detach(), mesh.dense["tensor_parallel"], [Shard(0)])
    experts.down_proj = nn.Parameter(weight)
    return module


def _buffer(mesh: TEDMesh) -> nn.Module:
    module = _pair()
    module["a"].register_buffer("table", distribute_tensor(torch.ones(8), mesh.dense["tensor_parallel"], [Shard(0)]))
    return module


_REFUSED: dict[str, tuple[Callable[[TEDMesh], nn.Module], type[Exception], str]] = {
    "fsdp": (_sharded_again, UnsupportedError, r"'a' .*`fully_shard`; leave the call out"),
    "partial": (
        _with_placement(Partial(), lambda m: m.dense["tensor_parallel"]),
        UnsupportedError,
        r"'a\.weight'.*Partial",
    ),
    "data mesh": (
        _with_placement(Shard(0), lambda m: m.dense["data_parallel"]),
        UnsupportedError,
        r"'a\.weight'.*tensor_p",
    ),
    "two axes": (_with_placement(Replicate(), lambda m: m.dense), UnsupportedError, r"'a\.weight'.*`self\.device_mesh"),
    "own mesh": (
        _with_placement(Shard(0), lambda m: init_device_mesh("cpu", (2,), mesh_dim_names=("mine",))),
        UnsupportedError,
        r"'a\.weight'.*`self\.device_mesh",
    ),
    "uneven": (_uneven, LayoutError, r"dimension 0 of 'a\.weight' \(length 7\).*`tensor_parallel_size=2`"),
    "planned": (_planned_too, PlanError, r"'a' .*`tensor_parallel_plan` names it too \(style 'colwise'\)"),
    "twice": (_twice, UnsupportedError, r"'a\.weight' has been parallelized twice.*`configure_model`"),
    "experts": (_expert_weights, UnsupportedError, r"'moe\.experts\.down_proj'.*MoE layer 'moe'"),
    "buffer": (_buffer, UnsupportedError, r"buffer 'table' of Linear is a DTensor"),
}


def _refusal(key: str) -> str:
    mesh = TEDMesh(TP2)
    make, kind, _ = _REFUSED[key]
    try:
        partition_module(make(mesh), mesh, PartitionOptions())
    except kind as error:
        return str(error)
    return ""


@pytest.mark.parametrize("key", _REFUSED)
def test_what_cannot_be_taken_over_is_refused_by_name(pools: Pools, key: str) -> None:
    for message in pools(2).run(_refusal, key):
        assert re.search(_REFUSED[key][2], message), message


def _port() -> float:
    return main(max_epochs=2).callback_metrics["val_loss"].item()


def test_the_example_of_a_ported_script_learns(pools: Pools) -> None:
    assert all(loss < math.log(32) - 0.3 for loss in pools(2).run(_port))


class _Compiled(LitDecoder):
    def configure_model(self) -> None:
        super().configure_model()
        assert self.model is not None
        self.model.layers[1].compile(backend="aot_eager")


def _to_experts() -> str:
    mesh = TEDMesh(TP2)
    layer = MoE(8, 16, 4)
    partition_module(nn.ModuleDict({"moe": layer}), mesh, PartitionOptions())
    try:
        layer(distribute_tensor(torch.ones(4, 8), mesh.dense["tensor_parallel"], [Shard(0)]))
    except UnsupportedError as error:
        return str(error)
    return ""


def test_a_moe_layer_refuses_a_dtensor(pools: Pools) -> None:
    for message in pools(2).run(_to_experts):
        assert "input of `MoE` is a DTensor" in message and "use_local_output=True" in message


def _last_loss(compiled: bool, strategy: dict[str, Any], **options: Any) -> float:
    fixed: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    run = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=TEDStrategy(tensor_parallel_size=2, **strategy),
        max_steps=2,
        use_distributed_sampler=False,
        enable_model_summary=False,
        **fixed,
        **options,
    )
    run.fit(_Compiled() if compiled else LitDecoder(), loader())
    return run.callback_metrics["train_loss"].item()


def _losses(compiled: bool, strategy: dict[str, Any], options: dict[str, Any]) -> tuple[float, float]:
    return _last_loss(False, {}), _last_loss(compiled, strategy, **options)


@pytest.mark.parametrize(
    ("compiled", "strategy", "options", "tolerance"),
    [
        (False, {"activation_checkpointing": "full", "zero_stage": 2}, {}, 1e-6),
        (False, {"activation_checkpointing": "comm_aware", "offload_optimizer": True}, {}, 1e-6),
        (False, {}, {"precision": "bf16-mixed"}, 2e-2),
        (True, {}, {}, 1e-6),
    ],
    ids=["full", "comm_aware", "bf16", "compiled"],
)
def test_other_options_go_with_it(
    pools: Pools, compiled: bool, strategy: dict[str, Any], options: dict[str, Any], tolerance: float
) -> None:
    for want, got in pools(2).run(_losses, compiled, strategy, options):
        assert abs(got - want) < tolerance
