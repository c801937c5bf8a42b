"""One training step of a module in this process (or on this rank), and what it computes."""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

from lightning_ted.adapters import stacked_experts
from lightning_ted.checkpoint.distributed import everybodys
from lightning_ted.checkpoint.single_file import SingleFile
from lightning_ted.checkpoint.stacked import with_single
from lightning_ted.checkpoint.tree import Names
from lightning_ted.collectives.phase import in_backward
from lightning_ted.errors import VerificationError
from lightning_ted.moe.expert_parallel import expert_parallel_layers
from lightning_ted.strategy.ted import TEDStrategy

#: Spread of what is added to all weights: constants, such as zeros in biases and ones in norms, hide errors.
_NOISE = 0.02
#: A warning that is of this run, not of the user's.
_NO_LOADER = "have no `val_dataloader`"


@dataclass
class Measured:
    """What one step has computed, of the whole batch.

    Attributes:
        loss: Of the step; None in manual optimization.
        outputs: What ``training_step`` returned, flat: numbers are means, others joined along their first dimension.
        modules: Of each module's output, by name and in the order of calls, the number of elements and the sum of squares.
        gradients: Raw gradients by name; None for those that have none.
        norms: Of the gradients of each optimizer.
        before: The state dict as the step found it.
        after: As it left it.
        partial: Replicated parameters that have other gradients on other tensor ranks.
        random: Where random numbers are switched off for the comparison.
        local: Modules whose statistics are of this rank's samples.
        told: Warnings.

    """

    loss: float | None = None
    outputs: list[Tensor] = field(default_factory=list)
    modules: dict[str, tuple[int, float]] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    partial: list[str] = field(default_factory=list)
    random: list[str] = field(default_factory=list)
    local: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)


def measure_together(
    module: pl.LightningModule, batch: Any, make: Callable[[], TEDStrategy], options: Mapping[str, Any], seed: int
) -> Measured | None:
    """Train one step on this rank's share of a batch; rank 0 returns what all ranks together have computed."""
    strategy = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        measured = _step(module, batch, strategy, options, seed, None)
        strategy.barrier()
    stacked = stacked_experts(module)
    measured.before, measured.after = with_single(stacked, measured.before), with_single(stacked, measured.after)
    measured.gradients = with_single(stacked, measured.gradients)
    measured.told = sorted(
        {text for w in caught if issubclass(w.category, UserWarning) and _NO_LOADER not in (text := str(w.message))}
    )
    return measured if strategy.is_global_zero else None


def measure_alone(
    module: pl.LightningModule, batch: Any, options: Mapping[str, Any], seed: int, before: Mapping[str, Tensor]
) -> Measured:
    """Train one step in this process, from given weights."""
    # What has no storage yet, only this package's strategy gives some.
    without_storage = any(p.is_meta for p in module.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        strategy = TEDStrategy() if without_storage else SingleDeviceStrategy()
        return _step(module, batch, strategy, options, seed, before)


def _step(
    module: pl.LightningModule,
    batch: Any,
    strategy: Any,
    options: Mapping[str, Any],
    seed: int,
    before: Mapping[str, Tensor] | None,
) -> Measured:
    pl.seed_everything(seed, verbose=False)
    # As a whole it is split in time: only the strategy knows how many data ranks there are.
    shares = _Shares(batch)
    capture = Capture(seed, before, shares)
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        callbacks=[capture],
        max_epochs=1,
        limit_train_batches=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(shares, batch_size=None))  # type: ignore[arg-type]
    return capture.measured


class _Shares:
    """The one batch of this run."""

    def __init__(self, batch: Any) -> None:
        self.batch, self.data, self.rank = batch, 1, 0

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return share_of(self.batch, self.data, self.rank)


def batch_size(batch: Any) -> int:
    """The number of samples: the first dimension of its tensors.

    Raises:
        VerificationError: If it has no tensors, or they do not agree.

    """
    sizes = {leaf.shape[0] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()}
    if len(sizes) != 1:
        raise VerificationError(
            f"The batch has {'no tensors' if not sizes else f'tensors with first dimensions {sorted(sizes)}'}; it must have "
            "tensors of the same first dimension, the samples, to be split over the data ranks."
        )
    return sizes.pop()


def share_of(batch: Any, data: int, rank: int) -> Any:
    """This data rank's samples of a batch."""
    if data == 1:
        return batch
    size = batch_size(batch)
    return _samples(batch, size, rank * (size // data), size // data)


def first_samples(batch: Any, size: int, count: int) -> Any:
    """The first ``count`` of ``size`` samples."""
    return _samples(batch, size, 0, count)


def _samples(batch: Any, size: int, first: int, count: int) -> Any:
    def is_list_of_samples(value: Any) -> bool:
        # Strings or the like, one for each sample.
        leaves = tree_leaves(value) if isinstance(value, list) and len(value) == size else [torch.empty(())]
        return not any(isinstance(leaf, Tensor) for leaf in leaves)

    def cut(value: Any) -> Any:
        has_samples = isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 0)
        return value[first : first + count] if has_samples else value

    return tree_map(cut, batch, is_leaf=is_list_of_samples)


class Capture(pl.Callback):
    """Notes what one step computes.

    Args:
        seed: Of the noise on the weights.
        before: The weights to begin with; None for the module's own with noise.
        shares: Told which data rank this is.

    Attributes:
        measured: What it has noted.

    """

    def __init__(self, seed: int, before: Mapping[str, Tensor] | None, shares: _Shares) -> None:
        self._seed, self._before, self._shares = seed, before, shares
        self._hooks: list[Any] = []
        self.measured = Measured()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        wrong = next((n for n, p in pl_module.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)), None)
        if wrong is not None:
            raise VerificationError(f"'{wrong}' is in 16 bits, which differ by rounding; build the module in float32.")
        self.measured.random = _switch_off_dropout(pl_module)
        strategy = trainer.strategy
        if isinstance(strategy, TEDStrategy):
            self._shares.data, self._shares.rank = strategy.topology.data, strategy.data_parallel_rank
            size = batch_size(self._shares.batch) if self._shares.data > 1 else 0
            if size % self._shares.data:
                raise VerificationError(
                    f"The batch of {size} samples cannot be split over {self._shares.data} data ranks; give one of a multiple."
                )
            if self._before is None:
                _perturb(pl_module, strategy, self._seed)
            assert strategy._training is not None
            strategy._training.reducer.audit.tell = self.measured.partial.extend
        if self._before is not None:
            pl_module.load_state_dict(self._before)
        self.measured.before = whole_state(strategy, pl_module)
        self.measured.local = [
            name
            for name, child in pl_module.named_modules()
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, nn.SyncBatchNorm)
        ]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Inside of them are this rank's experts.
        inside = tuple(f"{name}." for name in expert_parallel_layers(pl_module))
        for name, child in pl_module.named_modules():
            if name and not name.startswith(inside):
                self._hooks.append(child.register_forward_hook(partial(self._note, name)))

    def _note(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if in_backward():
            return  # recomputed
        tensor = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
        if tensor is None or not tensor.is_floating_point():
            return
        elements, squares = self.measured.modules.get(name, (0, 0.0))
        found = float(tensor.detach().double().square().sum())
        self.measured.modules[name] = elements + tensor.numel(), squares + found

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        named = dict(pl_module.named_parameters())
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        strategy = trainer.strategy
        names = [name for name, p in named.items() if id(p) in own and name not in self.measured.gradients]
        if isinstance(strategy, TEDStrategy):
            found = {name: strategy.full_gradient(name) for name in names}
            norm = strategy.grad_norm(optimizer)
        else:
            found = {name: named[name].grad for name in names}
            norm = torch.nn.utils.get_total_norm([p.grad.double() for n in names if (p := named[n]).grad is not None])
        self.measured.gradients |= {n: None if g is None else g.detach().clone() for n, g in found.items()}
        self.measured.norms.append(float(norm))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        leaves = [leaf.detach().clone() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        loss = outputs["loss"] if isinstance(outputs, Mapping) and "loss" in outputs else None
        measured = self.measured
        measured.after = whole_state(trainer.strategy, pl_module)
        measured.loss = None if loss is None else float(loss)
        measured.outputs = leaves
        if isinstance(trainer.strategy, TEDStrategy):
            _join(measured, trainer.strategy)


def _join(measured: Measured, strategy: TEDStrategy) -> None:
    """Let what each data rank has noted become that of the whole batch."""
    own: Any = (strategy.data_parallel_rank, measured.loss, measured.outputs, measured.modules)
    # Tensor ranks have the same; the first of them counts.
    by_data = dict(reversed([(data, rest) for data, *rest in everybodys(own, strategy.mesh.host_group())]))
    ranks = [by_data[data] for data in sorted(by_data)]
    losses = [loss for loss, _, _ in ranks if loss is not None]
    measured.loss = sum(losses) / len(losses) if losses else None
    measured.outputs = [
        torch.stack([part.double() for part in parts]).mean() if parts[0].dim() == 0 else torch.cat(parts)
        for parts in zip(*(outputs for _, outputs, _ in ranks), strict=True)
    ]
    measured.modules = {
        name: (sum(m.get(name, (0, 0.0))[0] for *_, m in ranks), sum(m.get(name, (0, 0.0))[1] for *_, m in ranks))
        for name in measured.modules
    }


def whole_state(strategy: Any, module: pl.LightningModule) -> dict[str, Tensor]:
    """Copies of the tensors of a state dict, whole. A collective under this package's strategy."""
    state = module.state_dict()
    if isinstance(strategy, TEDStrategy):
        file = SingleFile(Names(module, strategy.layouts), strategy.mesh, torch.device("cpu"))
        state = file.joined({"state_dict": state}, (), keep=True)["state_dict"]
    return {name: tensor.detach().clone() for name, tensor in state.items() if isinstance(tensor, Tensor)}


@torch.no_grad()
def _perturb(module: pl.LightningModule, strategy: TEDStrategy, seed: int) -> None:
    """Add noise to all weights and correction buffers, the same to every part of one."""
    named = [*module.named_parameters(), *((n, b) for n, b in module.named_buffers() if "correction" in n)]
    for name, tensor in named:
        layout = strategy.layouts[name]
        if tensor.is_floating_point():
            generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            noise = _NOISE * torch.randn(layout.global_shape, generator=generator)
            index: dict[str, int] = {cut.axis: strategy.mesh.axis(cut.axis).rank for cut in layout.cuts}
            tensor.add_(layout.part(noise, index).to(tensor.dtype))


def _switch_off_dropout(module: nn.Module) -> list[str]:
    """Set the probabilities of dropping to zero; the names of the modules where they were not."""
    found = []
    for name, child in module.named_modules():
        for leaf, value in list(vars(child).items()):
            drops = "dropout" in leaf or (leaf == "p" and isinstance(child, nn.modules.dropout._DropoutNd))
            if drops and isinstance(value, float) and value > 0:
                setattr(child, leaf, 0.0)
                found.append(name or type(module).__name__)
    return sorted(set(found))
