"""``offload_optimizer=True`` on several ranks: the same weights and the same checkpoint, which either kind of run resumes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ted import TEDStrategy
from lightning_ted.mesh import TEDMesh
from lightning_ted.topology import Topology
from tests.support.pool import Pools
from tests.support.runs import Toy, loader
from tests.support.stepping import backward, gradients, make_parameters, make_training

SHAPES: list[tuple[int, ...]] = [(7,), (150,), (3, 71), (1,), (0,), (2, 5), (90, 2)]


def _steps(zero_stage: int, working: torch.dtype | None, whole: bool, offloads: bool) -> dict[str, Any]:
    """What four steps leave on this rank; one parameter gets gradients from the first rank only, one from none at first."""
    parameters = make_parameters(SHAPES, torch.float32)
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.01)
    families = {"p1": "expert", "p6": "expert"}
    training = make_training(
        parameters,
        TEDMesh(Topology(dist.get_world_size(), expert=2)),
        [optimizer],
        zero_stage=zero_stage,
        tile_size=40,
        families=families,  # type: ignore[arg-type]
        working=working,
        whole=whole,
        offload=offloads,
    )
    norms = []
    for step in range(4):
        optimizer.zero_grad()
        for micro in range(2):
            grads = gradients(parameters, dist.get_rank(), step, micro)
            if dist.get_rank():
                del grads["p2"]
            if step < 2:
                del grads["p0"]
            backward(training, parameters, grads, last=micro == 1)
        norms.append(optimizer.sharded.grad_norm())
        optimizer.sharded.clip_by_norm(1.0)
        optimizer.step()
    state = optimizer.state_dict()
    masters = [optimizer.sharded.gather_master(parameter) for parameter in parameters.values()]
    weights = [parameter.detach().clone() for parameter in parameters.values()]
    training.release()
    released = [parameter.detach() for parameter in parameters.values()]
    return {"norms": norms, "state": state, "masters": masters, "weights": weights, "released": released}


def _compare_steps() -> None:
    for zero_stage, working, whole in (
        (1, None, False),
        (2, None, True),
        (1, torch.bfloat16, True),
        (2, torch.bfloat16, False),
    ):
        kept, offloaded = (_steps(zero_stage, working, whole, where) for where in (False, True))
        assert_same(offloaded, kept)


def assert_same(ours: Any, theirs: Any) -> None:
    """Bit for bit."""
    if isinstance(theirs, Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    elif isinstance(theirs, Mapping):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_same(ours[key], value)
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs, strict=True):
            assert_same(*pair)
    else:
        assert ours == theirs


@pytest.mark.parametrize("world", [2, 4])
def test_offloaded_shares_are_stepped_bit_for_bit_as_others(pools: Pools, world: int) -> None:
    pools(world).run(_compare_steps)


def _fit(folder: str, name: str, precision: str, offloads: bool, epochs: int, resume: str | None = None) -> None:
    strategy = TEDStrategy(
        tensor_parallel_size=2,
        expert_parallel_size=2,
        optimizer_tile_size=32,
        offload_optimizer=offloads,
        save_distributed_checkpoint=False,
    )
    run = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=4,
        max_epochs=epochs,
        precision=precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(Toy(), loader(4, 8), ckpt_path=resume and f"{folder}/{resume}", weights_only=True)
    run.save_checkpoint(f"{folder}/{name}")


def _fit_and_resume(folder: str, precision: str) -> None:
    _fit(folder, "kept", precision, False, 2)
    for offloads in (False, True):
        _fit(folder, f"half {offloads}", precision, offloads, 1)
        _fit(folder, f"other {offloads}", precision, not offloads, 2, resume=f"half {offloads}")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_checkpoints_are_the_same_and_resumed_by_either(pools: Pools, tmp_path: Path, precision: str) -> None:
    pools(4).run(_fit_and_resume, str(tmp_path), precision)
    files = {file.name: torch.load(file, weights_only=True) for file in tmp_path.iterdir()}
    for one, other in [
        ("half True", "half False"),
        ("other False", "kept"),
        ("other True", "kept"),
    ]:
        for part in ("state_dict", "optimizer_states"):
            assert_same(files[one][part], files[other][part])
    assert files["kept"]["optimizer_states"][0]["state"][0]["exp_avg"].abs().sum() > 0
