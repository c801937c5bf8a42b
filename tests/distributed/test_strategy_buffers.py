"""Running statistics: rank 0's on every rank when they are read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ted.collectives.recorder import CommRecorder
from lightning_ted.layout import Cut, ParamLayout
from lightning_ted.mesh import TEDMesh
from lightning_ted.strategy.buffers import synchronize_buffers
from lightning_ted.topology import Topology
from tests.support.pool import Pools
from tests.support.runs import Toy, assert_same_everywhere, loader, trainer


class _Normalised(Toy):
    def __init__(self) -> None:
        super().__init__("sgd")
        self.norm = nn.BatchNorm1d(8)

    def _loss(self, batch: Any) -> Tensor:
        return F.mse_loss(self.net(self.norm(batch[0])), batch[1])


def _statistics(layout: str, stage: str) -> tuple[dict[str, Tensor], float]:
    run = trainer(layout, max_epochs=2)
    run.fit(module := _Normalised(), loader())
    evaluate = run.validate if stage == "val" else run.test
    loss = evaluate(module, loader(), verbose=False)[0][f"{stage}_loss"]
    return {name: buffer.clone() for name, buffer in module.norm.named_buffers()}, loss


@pytest.mark.parametrize("stage", ["val", "test"])
def test_running_statistics_equal_ddp_on_every_rank(pools: Pools, stage: str) -> None:
    expected, loss = pools(2).run(_statistics, "ddp", stage)[0]
    results = pools(4).run(_statistics, "tp2", stage)
    assert_same_everywhere([statistics for statistics, _ in results])
    for name, tensor in expected.items():
        torch.testing.assert_close(results[0][0][name], tensor)
    assert abs(results[0][1] - loss) < 1e-5


class _Holder(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool):
            self.register_buffer(str(dtype).replace(".", "_"), torch.full((2, 3), rank).to(dtype))
        self.register_buffer("scalar", torch.tensor(float(rank)), persistent=False)
        self.register_buffer("cut", torch.full((2,), rank))
        self.register_buffer("cache", torch.full((2 + rank,), rank))
        self.register_buffer("unknown", torch.full((2,), rank))


def _synchronised() -> tuple[dict[str, Any], dict[Any, int]]:
    rank = dist.get_rank()
    module, mesh = _Holder(rank), TEDMesh(Topology(2))
    layouts = {name: ParamLayout(name, tuple(b.shape)) for name, b in module.named_buffers() if name != "unknown"}
    layouts["cut"] = ParamLayout("cut", (4,), (Cut(0, "tensor", 2, (4,)),))
    with mesh.recording(CommRecorder()) as recorder:
        synchronize_buffers(module, layouts, mesh.axis("data"))
    return {name: buffer.flatten()[0].item() for name, buffer in module.named_buffers()}, dict(recorder.calls)


def test_whole_buffers_of_equal_size_travel_in_one_broadcast(pools: Pools) -> None:
    values, calls = pools(2).run(_synchronised)[1]
    assert {name for name, value in values.items() if value == 1} == {"cut", "cache", "unknown"}
    assert calls[("broadcast", "data")] == 1


class _Differing(nn.Module):
    """Buffers that only some ranks have, or have in the same number of bytes only."""

    def __init__(self, rank: int, agreeing: bool) -> None:
        super().__init__()
        self.register_buffer("dtype", torch.full((2,), float(rank)).to([torch.float32, torch.int32][rank]))
        self.register_buffer("shape", torch.full(((2, 3), (3, 2))[rank], float(rank)))
        self.register_buffer("on_rank_0", torch.zeros(2) if rank == 0 else None)
        self.register_buffer("on_rank_1", torch.ones(2) if rank == 1 else None)
        self.register_buffer("nowhere", None)
        if agreeing:
            self.register_buffer("same", torch.full((2,), rank))


def _synchronise_differing(agreeing: bool) -> tuple[dict[str, Any], dict[Any, int]]:
    module, mesh = _Differing(dist.get_rank(), agreeing), TEDMesh(Topology(2))
    layouts = {name: ParamLayout(name, (2,)) for name in module._buffers}
    with mesh.recording(CommRecorder()) as recorder:
        synchronize_buffers(module, layouts, mesh.axis("data"))
    return {name: buffer.flatten()[0].item() for name, buffer in module.named_buffers()}, dict(recorder.calls)


def test_buffers_of_other_kinds_or_ranks_are_left_alone(pools: Pools) -> None:
    values, calls = pools(2).run(_synchronise_differing, True)[1]
    assert values == {"dtype": 1, "shape": 1.0, "on_rank_1": 1.0, "same": 0}
    assert calls == {("all_reduce", "data"): 1, ("broadcast", "data"): 1}


def test_nothing_is_sent_where_no_buffer_agrees(pools: Pools) -> None:
    values, calls = pools(2).run(_synchronise_differing, False)[1]
    assert set(values.values()) == {1} and calls == {("all_reduce", "data"): 1}


def _without_buffers() -> dict[Any, int]:
    mesh = TEDMesh(Topology(2))
    with mesh.recording(CommRecorder()) as recorder:
        synchronize_buffers(nn.Linear(2, 2), {}, mesh.axis("data"))
    return dict(recorder.calls)


def test_a_module_without_buffers_sends_nothing(pools: Pools) -> None:
    assert pools(2).run(_without_buffers) == [{}, {}]
