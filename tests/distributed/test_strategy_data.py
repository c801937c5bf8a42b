"""Tensor peers see the same samples in the same guise; data-parallel ranks see different ones."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_ted.errors import TEDError
from tests.support.pool import Pools
from tests.support.runs import SAMPLES, Numbered, Toy, loader, trainer


def _flat(batches: list[list[int]]) -> list[int]:
    return [i for batch in batches for i in batch]


def _seen(layout: str, nodes: int) -> tuple[dict[str, list[list[int]]], int, int]:
    if nodes > 1:
        per_node = dist.get_world_size() // nodes
        node, local = divmod(dist.get_rank(), per_node)
        os.environ.update(NODE_RANK=str(node), LOCAL_RANK=str(local))
    run = trainer(layout, num_nodes=nodes, max_epochs=1)
    run.fit(module := Toy(), loader(shuffle=True), loader())
    run.test(module, loader(), verbose=False)
    return module.seen, run.strategy.data_parallel_rank, run.strategy.data_parallel_size  # type: ignore[attr-defined]


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("layout", ["tp2", "tp2 etp1", "tp1 ep4", "tp4"])
def test_samples_are_equal_inside_a_tensor_group_and_complete_across_data_ranks(
    pools: Pools, layout: str, nodes: int
) -> None:
    if nodes == 2 and layout in ("tp1 ep4", "tp2 etp1"):
        pytest.skip("one layout that stays in a node and one that does not are enough")
    results = pools(4).run(_seen, layout, nodes)
    for stage in ("train", "val", "test"):
        by_data_rank: dict[int, list[int]] = {}
        for seen, rank, size in results:
            assert by_data_rank.setdefault(rank, _flat(seen[stage])) == _flat(seen[stage])
            assert len(_flat(seen[stage])) == SAMPLES // size
        assert sorted(_flat(list(by_data_rank.values()))) == list(range(SAMPLES))


class _Augmented(Numbered):
    def __getitem__(self, i: int) -> Any:
        return torch.rand(8), torch.rand(1), i


class _KeepsFirst(Toy):
    first: list[float]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.first = batch[0][0].tolist()
        return super().training_step(batch, batch_idx)


def _augmentation(workers: int, seeded: bool) -> list[float]:
    module, run = _KeepsFirst(), trainer("tp2", max_steps=1)
    if seeded:
        L.seed_everything(3, workers=True, verbose=False)
    else:  # as in a script that seeds nothing
        torch.manual_seed(dist.get_rank() + 10)
    run.fit(module, DataLoader(_Augmented(), batch_size=4, num_workers=workers))
    return module.first


@pytest.mark.parametrize("seeded", [True, False], ids=["seeded", "unseeded"])
@pytest.mark.parametrize("workers", [0, 1])
def test_augmentation_is_equal_inside_a_tensor_group(pools: Pools, workers: int, seeded: bool) -> None:
    first = pools(4).run(_augmentation, workers, seeded)
    assert first[0] == first[1] and first[2] == first[3]
    if workers or not seeded:  # in the main process, one seed for all is what DDP does too
        assert first[0] != first[2]


def _unequal_batches(different: list[int]) -> str:
    run = trainer("tp2", use_distributed_sampler=False)
    data = Numbered()
    data.x += dist.get_rank() if dist.get_rank() in different else 0
    try:
        run.fit(Toy(), DataLoader(data, batch_size=4))
    except TEDError as error:
        return str(error)
    return ""


def test_tensor_peers_with_different_batches_are_reported(pools: Pools) -> None:
    messages = pools(4).run(_unequal_batches, [0, 1, 2, 3])
    assert "stage 'train'" in messages[0] and "rank(s) 1 did not get the batch of rank 0" in messages[1]
    assert "rank(s) 3 did not get the batch of rank 2" in messages[2]
    assert "HINT" in messages[3]


def test_peers_with_equal_batches_stop_with_those_that_differ(pools: Pools) -> None:
    for message in pools(4).run(_unequal_batches, [3]):
        assert "peers: rank(s) 3 did not get the batch of rank 2. All 2 ranks" in message


def _predictions() -> tuple[list[int], bool]:
    run = trainer("tp2")
    ids = run.predict(Toy(), loader())
    return _flat(ids), run.strategy.is_data_writer  # type: ignore[attr-defined,arg-type]


def test_predictions_of_the_data_writers_are_complete_and_single(pools: Pools) -> None:
    written = [ids for ids, writes in pools(4).run(_predictions) if writes]
    assert sorted(_flat(written)) == list(range(SAMPLES))
