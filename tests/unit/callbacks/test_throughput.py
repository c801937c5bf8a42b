from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_ted.callbacks import TokenThroughput, throughput
from lightning_ted.callbacks.throughput import count_tokens, data_parallel_size

TOKENS = torch.zeros(4, 8, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (TOKENS, 32),
        ((TOKENS, torch.zeros(4, 9, dtype=torch.long)), 32),
        ([torch.rand(4, 3), TOKENS], 32),
        ({"labels": torch.zeros(4, 2, dtype=torch.long), "input_ids": TOKENS}, 32),
        ({"attention_mask": torch.ones(4, 8, dtype=torch.bool), "text": "no tensor", "nested": {"ids": TOKENS}}, 32),
        (torch.rand(4, 8), 0),
        (None, 0),
    ],
)
def test_tokens_are_the_first_integer_tensor_of_a_batch(batch: object, count: int) -> None:
    assert count_tokens(batch) == count


def test_tensor_parallel_ranks_are_not_counted_twice() -> None:
    strategy = MagicMock(spec=DDPStrategy, distributed_sampler_kwargs={"num_replicas": 3, "rank": 0})
    assert data_parallel_size(SimpleNamespace(strategy=strategy)) == 3
    assert data_parallel_size(SimpleNamespace(strategy=SingleDeviceStrategy("cpu"))) == 1


def test_speed_is_tokens_of_all_ranks_over_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 3.0, 4.0, 100.0, 101.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    trainer = SimpleNamespace(
        strategy=MagicMock(spec=DDPStrategy, distributed_sampler_kwargs={"num_replicas": 2, "rank": 0})
    )
    module, callback = MagicMock(), TokenThroughput(window=2)
    speeds = []
    for step in range(4):
        if step == 3:
            callback.on_validation_start(trainer, module)
        callback.on_train_batch_start(trainer, module, TOKENS, step)
        callback.on_train_batch_end(trainer, module, None, TOKENS, step)
        name, speed = module.log.call_args.args
        assert name == "tokens/s"
        speeds.append(speed)
    # 64 tokens a batch: 2 s; 2 + 1 s; the last two batches in 1 + 1 s; and 1 s after a validation that took no part.
    assert speeds == [32.0, 43.0, 64.0, 64.0]


def test_window_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="`window=0`"):
        TokenThroughput(window=0)
