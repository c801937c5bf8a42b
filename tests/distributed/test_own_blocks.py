"""MoE blocks of a user's own, by what a ``MoESpec`` says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_ted import MoESpec, TEDStrategy
from lightning_ted.convert import convert
from lightning_ted.errors import LayoutError
from lightning_ted.moe import expert_counts
from tests.support.blocks import BLOCKS, SAID, Own
from tests.support.pool import Pools
from tests.support.runs import assert_close, assert_same_everywhere, loader, trainer, whole_weights

LAYOUTS = {
    2: ({"expert_parallel_size": 2}, {"tensor_parallel_size": 2}),
    4: ({"tensor_parallel_size": 2, "expert_parallel_size": 2}, {"tensor_parallel_size": 2, "expert_parallel_size": 4}),
}


def _spec(kind: str, **entries: Any) -> MoESpec:
    return MoESpec(block=kind, **{**SAID[kind], **entries})


def _strategy(kind: str, sizes: dict[str, int], **options: Any) -> TEDStrategy:
    folded = kind == "OddBlock" or sizes.get("expert_parallel_size") == 4
    extra = {"expert_tensor_parallel_size": 1} if folded else {}
    plan = {
        "net.blocks.*.shared.w1": "colwise",
        "net.blocks.*.shared.w3": "colwise",
        "net.blocks.*.shared.w2": "rowwise",
    }
    if kind == "FusedBlock" and sizes.get("tensor_parallel_size"):
        extra["tensor_parallel_plan"] = plan  # type: ignore[assignment]
    return TEDStrategy(moe_specs=[_spec(kind)], **sizes, **extra, **options)


def _run(kind: str, strategy: Any, batch_size: int, path: str | None = None, **options: Any) -> L.Trainer:
    run = trainer(
        "ddp unused", devices=torch.distributed.get_world_size(), gradient_clip_val=0.5, **{"max_epochs": 1, **options}
    )
    if strategy is not None:
        run = L.Trainer(
            strategy=strategy,
            accelerator="cpu",
            devices=torch.distributed.get_world_size(),
            gradient_clip_val=0.5,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **{"max_epochs": 1, **options},
        )
    run.fit(Own(kind), loader(batch_size), ckpt_path=path)
    return run


def _single(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of the plain module."""
    result = dict(weights)
    for name in list(result):
        parts = name.split(".experts.")
        if len(parts) == 2:
            whole = result.pop(name)
            result |= {f"{parts[0]}.experts.{number}.{parts[1]}": part for number, part in enumerate(whole)}
    return result


def _train(kind: str, sizes: dict[str, int]) -> dict[str, Tensor]:
    run = _run(
        kind, _strategy(kind, sizes), 16 // (torch.distributed.get_world_size() // sizes.get("tensor_parallel_size", 1))
    )
    counts = expert_counts(run.lightning_module)
    assert len(counts) == 2 and all(int(count.sum()) > 0 for count in counts.values())
    return _single(whole_weights(run))


def _replicated(kind: str) -> dict[str, Tensor]:
    """What DDP makes of the plain module, on as many ranks as there are data ranks, with the same batches."""
    return whole_weights(_run(kind, None, 16 // torch.distributed.get_world_size()))


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_blocks_train_like_one_process(pools: Pools, kind: str) -> None:
    want = {data: pools(data).run(_replicated, kind)[0] for data in (1, 2)}
    for world, layouts in LAYOUTS.items():
        for sizes in layouts:
            got = pools(world).run(_train, kind, sizes)
            data = world // sizes.get("tensor_parallel_size", 1)
            assert_same_everywhere(got)
            assert_close(got[0], want[data], 1e-5)


# -- checkpoints -----------------------------------------------------------------------------------------------------------


def _save(kind: str, folder: Path) -> dict[str, Tensor]:
    sizes = LAYOUTS[4][0]
    run = _run(kind, _strategy(kind, sizes, save_distributed_checkpoint=False), 8)
    run.save_checkpoint(folder / "file.ckpt")
    run = _run(kind, _strategy(kind, sizes), 8)
    run.save_checkpoint(folder / "directory")
    return _single(whole_weights(run))


def _resume(kind: str, path: str, sizes: dict[str, int]) -> dict[str, Tensor]:
    batch_size = 16 // (torch.distributed.get_world_size() // sizes.get("tensor_parallel_size", 1))
    return _single(whole_weights(_run(kind, _strategy(kind, sizes), batch_size, path, max_epochs=2)))


def _test(kind: str, path: str) -> None:
    run = L.Trainer(
        strategy=_strategy(kind, LAYOUTS[2][0]), accelerator="cpu", devices=2, logger=False, enable_model_summary=False
    )
    run.test(Own(kind), loader(), ckpt_path=path, verbose=False)


@pytest.mark.parametrize("kind", ["ListBlock", "FusedBlock"])
def test_checkpoints_are_those_of_the_plain_module(pools: Pools, tmp_path: Path, kind: str) -> None:
    want = pools(4).run(_save, kind, tmp_path)[0]
    for path in ("file.ckpt", "directory"):
        if path == "directory":
            convert(str(tmp_path / path), str(tmp_path / "converted.ckpt"))
            path = "converted.ckpt"
        plain = Own.load_from_checkpoint(tmp_path / path, kind=kind)
        assert_close(dict(plain.state_dict()), want, 0.0)
    convert(str(tmp_path / "file.ckpt"), str(tmp_path / "again"))
    found = [
        pools(world).run(_resume, kind, str(tmp_path / path), sizes)[0]
        for path, world, sizes in (
            ("directory", 4, LAYOUTS[4][0]),
            ("file.ckpt", 2, LAYOUTS[2][0]),
            ("again", 2, LAYOUTS[2][1]),
        )
    ]
    for other in found[1:]:
        assert_close(other, found[0], 1e-5)


def test_weights_of_one_process_are_read(pools: Pools, tmp_path: Path) -> None:
    torch.save(
        {"state_dict": Own("ListBlock").state_dict(), "pytorch-lightning_version": "2.6.6"}, tmp_path / "plain.ckpt"
    )
    pools(2).run(_test, "ListBlock", str(tmp_path / "plain.ckpt"))


# -- before processes start ------------------------------------------------------------------------------------------------


def _late(kind: str) -> dict[str, Tensor]:
    strategy = _strategy(kind, LAYOUTS[2][0])
    run = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2,
        max_epochs=1,
        gradient_clip_val=0.5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(Own(kind, late=True), loader(8))
    return _single(whole_weights(run))


def test_blocks_that_come_late(pools: Pools) -> None:
    want = pools(2).run(_replicated, "ListBlock")[0]
    assert_close(pools(2).run(_late, "ListBlock")[0], want, 1e-5)


def test_experts_of_any_kind_cannot_be_cut_themselves() -> None:
    strategy = TEDStrategy(moe_specs=[_spec("OddBlock")], tensor_parallel_size=2)
    with pytest.raises(LayoutError, match="Odd is no network of two or three linear layers"):
        strategy.resolve(Own("OddBlock"), 2, 2)
