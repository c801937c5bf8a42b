"""What has lost its process group says so: torch would take None for the whole world."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from lightning_ted.errors import TEDError
from lightning_ted.mesh import Axis
from lightning_ted.strategy.batchnorm import synchronize_batchnorm
from lightning_ted.strategy.metrics import GatherOverData

PICKLED = pickle.loads(pickle.dumps(Axis("data", 2, 0)))


def test_a_metric_with_a_pickled_axis_does_not_gather_over_the_world() -> None:
    with pytest.raises(TEDError, match="'data' axis of size 2 is not attached"):
        GatherOverData(PICKLED)(torch.ones(2))
    assert len(GatherOverData(Axis("data"))(torch.ones(2))) == 1


def test_a_batchnorm_with_a_pickled_axis_does_not_sum_over_the_world() -> None:
    layer = synchronize_batchnorm(nn.Sequential(nn.BatchNorm1d(2)), PICKLED)[0]  # type: ignore[index]
    with pytest.raises(TEDError, match="'data' axis of size 2 is not attached"):
        _ = layer.process_group
