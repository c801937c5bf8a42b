"""Set-up and the stages of a run: cutting once, layers made late, what is told and what is refused."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from math import prod
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.tuner import Tuner
from torch import nn

from lightning_ted import TEDStrategy
from lightning_ted.errors import LayoutError, UnsupportedError
from lightning_ted.strategy.batchnorm import DataSyncBatchNorm
from tests.support.pool import Pools, WorkerError
from tests.support.runs import Net, Toy, assert_close, assert_same_everywhere, loader, trainer, whole_weights


def _ted(run: L.Trainer) -> TEDStrategy:
    assert isinstance(run.strategy, TEDStrategy)
    return run.strategy


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    ["import lightning, lightning_ted", "import lightning_ted, lightning", "import lightning_ted.topology, lightning"],
)
def test_strategy_is_known_by_name_whatever_is_imported_first(imports: str) -> None:
    program = (
        "import lightning_ted, sys\nassert 'torch' not in sys.modules and 'lightning' not in sys.modules\n"
        if imports.startswith("import lightning_ted")
        else ""
    ) + (
        f"{imports}\nrun = lightning.Trainer(strategy='ted', accelerator='cpu', devices=1, logger=False)\n"
        "print(type(run.strategy).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "TEDStrategy", done.stderr


# ----------------------------------------------------------------------------------------------------------------------


def _all_stages() -> dict[str, Any]:
    run, module = trainer("tp2", max_epochs=1), Toy()
    shapes, losses = [], []
    losses.append(run.validate(module, loader(), verbose=False)[0]["val_loss"])
    up = module.net.up.weight
    mesh = _ted(run).mesh
    for _ in range(2):
        run.fit_loop.max_epochs += 1
        run.fit(module, loader(), loader())
        losses.append(run.callback_metrics["val_loss"].item())
        losses.append(run.test(module, loader(), verbose=False)[0]["test_loss"])
        run.predict(module, loader())
        shapes.append(tuple(module.net.up.weight.shape))
    assert module.net.up.weight is up and _ted(run).mesh is mesh
    return {"losses": losses, "shapes": shapes, "weights": whole_weights(run)}


def test_stages_follow_each_other_on_a_module_that_is_cut_once(pools: Pools) -> None:
    results = pools(4).run(_all_stages)
    assert_same_everywhere([result["weights"] for result in results])
    for result in results:
        assert result["losses"] == results[0]["losses"] and result["shapes"] == [(8, 8)] * 2
        assert len(set(result["losses"])) == 3 and result["losses"][1] == result["losses"][2]


def _another_layout() -> tuple[float, float, str]:
    module = Toy()
    first = trainer("tp2").validate(module, loader(), verbose=False)[0]["val_loss"]
    again = trainer("tp2").validate(module, loader(), verbose=False)[0]["val_loss"]
    try:
        trainer("tp4").validate(module, loader(), verbose=False)
    except LayoutError as error:
        return first, again, str(error)
    return first, again, ""


def test_a_cut_module_is_reused_by_the_same_layout_and_refused_by_another(pools: Pools) -> None:
    for first, again, message in pools(4).run(_another_layout):
        assert first == again
        assert "Toy has been cut for" in message and "load a checkpoint" in message


def _groups() -> tuple[int, int]:
    run = trainer("tp2", max_steps=1)
    run.fit(Toy(), loader())
    before = len(dist.distributed_c10d._world.pg_map)
    if dist.get_rank() == 1:
        assert _ted(run).expert_mesh.size() == 4
    return before, len(dist.distributed_c10d._world.pg_map)


def test_one_rank_may_ask_for_the_expert_mesh_alone(pools: Pools) -> None:
    # It would make groups that the others do not have, and later ones could wait for ever.
    assert all(before == after for before, after in pools(4).run(_groups))


class _Late(Toy):
    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            assert self.device_mesh is not None and self.device_mesh["tensor_parallel"].size() == 2
            torch.manual_seed(7)
            self.net = Net()


def _late_layers(late: bool) -> tuple[dict[str, torch.Tensor], int, tuple[int, ...]]:
    run = trainer("tp2", max_epochs=1)
    run.fit(module := _Late() if late else Toy(), loader())
    run.test(module, loader(), verbose=False)
    return whole_weights(run), _ted(run).expert_parallel_size, tuple(module.net.moe.experts.gate_up_proj.shape)


def test_layers_of_configure_model_are_cut_as_those_of_init(pools: Pools) -> None:
    late, early = pools(4).run(_late_layers, True), pools(4).run(_late_layers, False)
    assert_same_everywhere([weights for weights, *_ in late])
    assert_close(late[0][0], early[0][0], 1e-6)
    # "auto": four experts on two ranks, of which each cuts their width in two.
    assert late[0][1:] == early[0][1:] == (2, (2, 16, 8))


# ----------------------------------------------------------------------------------------------------------------------


class _Normalised(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.Sequential(nn.BatchNorm1d(8), nn.SyncBatchNorm(8))

    def on_fit_start(self) -> None:
        self.kinds = [type(layer).__name__ for layer in self.norms]
        self.ranks = dist.get_process_group_ranks(self.norms[0].process_group) if self._split() else []
        self.names = list(copy.deepcopy(self.norms).state_dict())

    def _split(self) -> bool:
        return isinstance(self.norms[0], DataSyncBatchNorm)


def _batchnorm(layout: str) -> tuple[list[str], list[int], list[str], list[str]]:
    run = trainer(layout, sync_batchnorm=True, max_steps=1)
    run.fit(module := _Normalised(), loader())
    return module.kinds, module.ranks, module.names, [type(layer).__name__ for layer in module.norms]


def test_batchnorm_is_synchronised_over_data_ranks(pools: Pools) -> None:
    names = list(nn.Sequential(nn.BatchNorm1d(8), nn.BatchNorm1d(8)).state_dict())
    for rank, (kinds, ranks, copied, after) in enumerate(pools(4).run(_batchnorm, "tp2")):
        assert kinds == ["DataSyncBatchNorm"] * 2 and ranks == [rank % 2, rank % 2 + 2] and copied == names
        assert "DataSyncBatchNorm" not in after
    assert pools(4).run(_batchnorm, "tp4")[0][0] == ["BatchNorm1d", "SyncBatchNorm"]


def _line() -> list[str]:
    import logging

    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(handler := Keep())
    level, _ = logger.level, logger.setLevel(logging.INFO)
    try:
        run, module = trainer("tp2", max_steps=1), Toy()
        run.validate(module, loader(), verbose=False)
        run.fit(module, loader())
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return [line for line in lines if line.startswith("TEDStrategy")] + [
        str(sum(p.numel() for p in module.parameters()))
    ]


def test_layout_and_parameter_counts_are_told(pools: Pools) -> None:
    (*lines, local), *others = pools(4).run(_line)
    total = sum(prod(p.shape) for p in Toy().parameters())
    assert lines[0] == (
        "TEDStrategy: 4 ranks = tensor 2 x data 2 = expert-tensor 2 x expert 2 x expert-data 1; "
        f"{total:,} parameters, {int(local):,} on this rank"
    )
    assert len(lines) == 2 and all(len(other) == 1 for other in others)


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"fast_dev_run": True},
        {"detect_anomaly": True, "max_steps": 1},
        {"profiler": "simple", "max_steps": 1},
        {"num_sanity_val_steps": 2, "max_steps": 1},
        {"limit_train_batches": 0.5, "val_check_interval": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_trainer_flag_works(pools: Pools, options: dict[str, Any]) -> None:
    assert_same_everywhere(pools(4).run(_with_flag, options))


def _with_flag(options: dict[str, Any]) -> dict[str, torch.Tensor]:
    run = trainer("tp2", **options)
    run.fit(Toy(), loader(), loader())
    return whole_weights(run)


def _find_learning_rate(folder: str) -> float | None:
    run = trainer("tp2", default_root_dir=f"{folder}/{dist.get_rank()}", logger=False, enable_checkpointing=True)
    finder = Tuner(run).lr_find(Toy(), loader(), num_training=12)
    assert finder is not None
    return finder.suggestion(skip_begin=2, skip_end=1)


def test_learning_rate_finder_agrees_on_all_ranks(pools: Pools, tmp_path: Any) -> None:
    for rank in range(4):
        (tmp_path / str(rank)).mkdir()
    assert len(set(pools(4).run(_find_learning_rate, str(tmp_path)))) == 1


def _find_batch_size() -> str:
    try:
        trainer("tp2", callbacks=[BatchSizeFinder()]).fit(Toy(), loader())
    except Exception as error:
        return str(error)
    return ""


def test_batch_size_finder_is_refused_as_under_ddp(pools: Pools) -> None:
    assert all("not supported with distributed strategies" in text for text in pools(4).run(_find_batch_size))


class _FailsOnOneRank(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if dist.get_rank() == 1:
            raise KeyError("the reason")
        return super().training_step(batch, batch_idx)


def _one_rank_fails() -> None:
    try:
        trainer("tp2").fit(_FailsOnOneRank(), loader())
    except KeyError:
        os._exit(7)  # the failing rank came out of `fit`, and its process ends


def test_a_failing_rank_comes_out_of_fit_and_its_peers_say_so(pools: Pools) -> None:
    with pytest.raises(WorkerError) as error:
        pools(4).run(_one_rank_fails)
    assert "the worker died with exit code 7" in str(error.value)
    assert "Another rank has left" in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------


def _on_two_devices(**options: Any) -> L.Trainer:
    return L.Trainer(accelerator="cpu", devices=2, logger=False, enable_checkpointing=False, **options)


def test_sizes_are_checked_before_any_process_is_started() -> None:
    run = _on_two_devices(strategy=TEDStrategy(tensor_parallel_size=3))
    with pytest.raises(LayoutError, match="`tensor_parallel_size=3` does not divide the world size 2"):
        run.fit(Toy(), loader())
    run = _on_two_devices(strategy=TEDStrategy(expert_parallel_size=2, expert_tensor_parallel_size=2))
    with pytest.raises(LayoutError, match="`expert_tensor_parallel_size=2` does not divide"):
        run.fit(Toy(), loader())
    assert run.strategy.launcher.procs == []  # type: ignore[union-attr]


def test_pure_fp16_and_foreign_precision_plugins_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="'16-true'.*Use `precision='16-mixed'`"):
        _on_two_devices(strategy=TEDStrategy(), precision="16-true")
    from lightning.pytorch.plugins.precision import FSDPPrecision

    with pytest.raises(UnsupportedError, match="`FSDPPrecision` cannot be used"):
        TEDStrategy(precision_plugin=FSDPPrecision("bf16-mixed"))


def _requeue() -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer("tp2", max_steps=1)
        run.strategy.cluster_environment.auto_requeue = SLURMEnvironment().auto_requeue  # type: ignore[attr-defined]
        run.fit(Toy(), loader())
    return [str(w.message) for w in caught]


def test_automatic_requeueing_is_warned_of(pools: Pools) -> None:
    assert any("SLURMEnvironment(auto_requeue=False)" in message for message in pools(4).run(_requeue)[0])
