"""What else a run needs to go on as if it had not been interrupted: random states, and where loaders stand.

Lightning keeps neither the random states nor more than rank 0's loaders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_ted.strategy._compat import begins_epoch
from lightning_ted.strategy.data import restore_random_state
from lightning_ted.topology import Topology


def states_of_ranks(
    checkpoint: Mapping[str, Any], random: Mapping[str, Any], topology: Topology, group: dist.ProcessGroup | None
) -> dict[str, Any]:
    """Of all ranks, as plain data, on rank 0. A collective over ``group``."""
    own = {"random": _plain(random), "loaders": _fit_loop(checkpoint).get("combined_loader")}
    ranks: list[Any] | None = [own]
    if group is not None:
        ranks = [None] * topology.world_size if dist.get_rank(group) == 0 else None
        dist.gather_object(own, ranks, group=group, group_dst=0)
    return {"tensor": topology.tensor, "ranks": ranks or []}


class GoingOn:
    """Lets a run go on where a checkpoint was written.

    Args:
        saved: What :func:`states_of_ranks` returned; None if the checkpoint holds nothing of it.
        topology: The arrangement of the ranks now.
        rank: This rank.
        device: Its device.

    """

    def __init__(self, saved: Mapping[str, Any] | None, topology: Topology, rank: int, device: torch.device) -> None:
        ranks: Sequence[Mapping[str, Any]] = saved["ranks"] if saved else []
        self._device = device
        self._own: Mapping[str, Any] | None = None
        self._same_data = False
        if saved and ranks:
            data = len(ranks) // saved["tensor"]
            self._same_data = data == topology.data
            # Tensor peers are equal; a data rank that was not there is given the state of one that was.
            at = topology.coordinates(rank)
            self._own = ranks[
                at.data % data * saved["tensor"] + (at.tensor if saved["tensor"] == topology.tensor else 0)
            ]

    def take_loaders(self, checkpoint: Mapping[str, Any]) -> None:
        """Put this rank's loaders' states where Lightning looks for them."""
        fit_loop = _fit_loop(checkpoint)
        if self._own is None or not fit_loop.get("combined_loader"):
            return
        if self._same_data:
            fit_loop["combined_loader"] = self._own["loaders"]
        else:
            rank_zero_warn(
                "The data loaders had a state for each of another number of data-parallel ranks; all go on from that of the first."
            )

    def restore_random_state(self, trainer: pl.Trainer) -> None:
        """To be called when training is about to fetch its first batch."""
        if self._own is None:
            return
        restore_random_state(_from_plain(self._own["random"]), self._device)
        fetcher, loader = trainer.fit_loop._data_fetcher, trainer.fit_loop._combined_loader
        assert fetcher is not None and loader is not None
        # At the border of two epochs, the iterator would have been made now, and drawn its seed.
        if begins_epoch(trainer) and not loader._state_dicts():
            iter(fetcher)


def _plain(random: Mapping[str, Any]) -> dict[str, Any]:
    random = dict(random)
    if "numpy" in random:
        kind, keys, *rest = random["numpy"]
        random["numpy"] = [kind, torch.from_numpy(keys.astype("int64")), *rest]
    return random


def _from_plain(random: Mapping[str, Any]) -> dict[str, Any]:
    random = dict(random)
    if "numpy" in random:
        kind, keys, *rest = random["numpy"]
        random["numpy"] = (kind, keys.numpy().astype("uint32"), *rest)
    return random


def _fit_loop(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    return checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
