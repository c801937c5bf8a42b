from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from lightning_ted.callbacks import ExpertLoadMonitor, expert_load
from lightning_ted.callbacks.expert_load import imbalance
from lightning_ted.moe import MoE


@pytest.mark.parametrize(
    ("counts", "load"), [([5, 5, 5, 5], 1.0), ([8, 0, 0, 0], 4.0), ([3, 1, 0, 0], 3.0), ([0, 0], 1.0)]
)
def test_imbalance_is_the_busiest_expert_in_multiples_of_the_mean(counts: list[int], load: float) -> None:
    assert imbalance(torch.tensor(counts)) == load


def test_every_layer_is_logged_and_the_worst_is_in_the_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"blocks.1.ffn": torch.tensor([2.0, 2.0]), "blocks.3.ffn": torch.tensor([3.0, 1.0])}
    monkeypatch.setattr(expert_load, "expert_counts", lambda module: counts)
    trainer, module = SimpleNamespace(global_step=10, log_every_n_steps=10), MagicMock(**{"modules.return_value": []})
    ExpertLoadMonitor().on_train_batch_end(trainer, module, None, None, 9)
    module.log_dict.assert_called_once_with({"expert_load/blocks.1.ffn": 1.0, "expert_load/blocks.3.ffn": 1.5})
    module.log.assert_called_once_with("expert_load", 1.5, prog_bar=True)


def test_counts_are_gathered_once_every_n_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr(expert_load, "expert_counts", lambda module: looks.append(1) or {})
    trainer, callback = SimpleNamespace(global_step=0, log_every_n_steps=10), ExpertLoadMonitor(every_n_steps=2)
    for batch in range(16):  # accumulation: two batches to a step
        trainer.global_step = (batch + 1) // 2
        callback.on_train_batch_end(trainer, torch.nn.Linear(2, 2), None, None, batch)
    assert len(looks) == 4


def test_a_real_layer_is_counted() -> None:
    layer = MoE(8, 16, 4, top_k=2, capacity_factor=1.0)
    layer(torch.randn(6, 8))
    module = torch.nn.ModuleDict({"moe": layer})
    module.log, module.log_dict = MagicMock(), MagicMock()
    trainer = SimpleNamespace(global_step=1, log_every_n_steps=1)
    ExpertLoadMonitor().on_train_batch_end(trainer, module, None, None, 0)
    (loads,), (rates,) = (call.args for call in module.log_dict.call_args_list)
    assert 0.0 <= rates["drop_rate/moe"] <= 0.5
    assert list(loads) == ["expert_load/moe"]
    assert 1.0 <= loads["expert_load/moe"] <= 2.0  # top-2: an expert gets each token at most once, half of all choices


def test_a_model_without_experts_logs_nothing() -> None:
    module = torch.nn.Linear(2, 2)
    module.log, module.log_dict = MagicMock(), MagicMock()
    ExpertLoadMonitor().on_train_batch_end(SimpleNamespace(global_step=1, log_every_n_steps=1), module, None, None, 0)
    module.log.assert_not_called()
    module.log_dict.assert_not_called()


def test_frequency_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="`every_n_steps=0`"):
        ExpertLoadMonitor(every_n_steps=0)
