"""``Trainer(sync_batchnorm=True)``: statistics over the data-parallel ranks."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.plugins import LayerSync, TorchSyncBatchNorm
from torch import nn

from lightning_ted.mesh import Axis


class DataSyncBatchNorm(nn.SyncBatchNorm):
    """A ``SyncBatchNorm`` over the data axis.

    It keeps the axis and looks its group up when asked, because a module that holds a process group cannot be copied.
    """

    data_axis: Axis

    @property
    def process_group(self) -> Any:  # type: ignore[override]
        """The group of the data axis."""
        return self.data_axis.attached_group


def synchronize_layers(plugin: LayerSync, module: nn.Module, data_axis: Axis) -> nn.Module:
    """What ``plugin`` does to ``module``; Lightning's own plugin, which would sum over the world, sums over data."""
    if type(plugin) is TorchSyncBatchNorm:
        return synchronize_batchnorm(module, data_axis)
    return plugin.apply(module)


def synchronize_batchnorm(module: nn.Module, data_axis: Axis) -> nn.Module:
    """Replace the batch normalisations in ``module``; its own ``SyncBatchNorm`` layers with a group are left alone.

    With one data-parallel rank nothing is replaced: tensor peers saw the same samples.
    """
    if data_axis.size == 1:
        return module
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for layer in module.modules():
        if type(layer) is nn.SyncBatchNorm and layer.process_group is None:
            del layer.process_group
            layer.__class__ = DataSyncBatchNorm
            layer.data_axis = data_axis  # type: ignore[assignment]
    return module
