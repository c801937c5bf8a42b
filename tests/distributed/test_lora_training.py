"""Training adapters of a frozen model: what it costs, its checkpoints, and its recomputation."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_ted import TEDStrategy, from_pretrained
from lightning_ted.adapters.peft import plain_name
from lightning_ted.errors import CheckpointError, UnsupportedError
from lightning_ted.inspection import describe
from tests.support.pool import Pools
from tests.support.runs import assert_close, assert_same_everywhere, trainer, whole_weights

pytest.importorskip("peft")

from benchmarks.families import build  # noqa: E402
from tests.distributed.test_lora import ATTENTION, EXPERTS, adapted  # noqa: E402

#: Tensor, expert and expert-tensor degree on four processes.
TP2EP2 = (2, 2, 2)


class Adapted(L.LightningModule):
    """As a user would write it."""

    def __init__(self, unfrozen: str = "", checkpointing: bool = False, lr: float = 0.01) -> None:
        super().__init__()
        self.model: Any = adapted("qwen3_moe")
        self.lr = lr
        if checkpointing:
            self.model.enable_input_require_grads()
            self.model.base_model.model.activation_checkpointing_enable()
        for name, parameter in self.named_parameters():
            if unfrozen and unfrozen in name:
                parameter.requires_grad_()
        self.model.train()
        self.products: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9) if self.lr == 0.1 else self.adam()

    def adam(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with Products() as products:
            super().backward(loss, *args, **kwargs)
        self.products.append(products.grouped)


class Products(TorchDispatchMode):
    """Counts grouped products."""

    grouped = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.grouped += func is torch.ops.aten._grouped_mm.default
        return func(*args, **(kwargs or {}))


def _tokens(batch_size: int) -> DataLoader:
    # Two steps are an epoch.
    data = torch.randint(3, 64, (8, 8), generator=torch.Generator().manual_seed(1))
    return DataLoader(data, batch_size=batch_size)  # type: ignore[arg-type]


def _fit(
    sizes: tuple[int, int, int] | None,
    epochs: int,
    module: Adapted | None = None,
    resumed: Path | None = None,
    saved: Path | None = None,
    **options: Any,
) -> L.Trainer:
    """Train on the same batches whatever the layout, and save at the end."""
    names = ("tensor_parallel_size", "expert_parallel_size", "expert_tensor_parallel_size")
    strategy: Any = DDPStrategy() if sizes is None else TEDStrategy(**dict(zip(names, sizes)), **options)  # noqa: B905
    world = dist.get_world_size()
    run = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=world,
        max_epochs=epochs,
        gradient_clip_val=0.5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if sizes is not None and "activation_checkpointing" in options:
        strategy.record_communication = True
    data = world if sizes is None else world // sizes[0]
    run.fit(module or Adapted(), _tokens(4 // data), ckpt_path=resumed)
    if saved is not None:
        run.save_checkpoint(saved)
        strategy.barrier()
    return run


def _weights(sizes: tuple[int, int, int] | None, *args: Any, **options: Any) -> dict[str, Tensor]:
    return whole_weights(_fit(sizes, *args, **options))


# -- steps -----------------------------------------------------------------------------------------------------------------


def _steps(sizes: tuple[int, int, int] | None) -> tuple[dict[str, Tensor], list[str]]:
    """The weights, and the names of those that have changed."""
    weights, before = _weights(sizes, 2, Adapted(lr=0.1)), Adapted().state_dict()
    return weights, [name for name, weight in weights.items() if not torch.equal(weight, before[name])]


def test_steps_equal_those_of_peft_alone(pools: Pools) -> None:
    want, moved = pools(2).run(_steps, None)[0]
    assert moved and all("lora" in name for name in moved)
    for world, sizes in ((2, (2, 1, 2)), (4, TP2EP2)):
        ranks = [weights for weights, _ in pools(world).run(_steps, sizes)]
        assert_same_everywhere(ranks)
        assert_close(ranks[0], want, 1e-5)


def _frozen() -> tuple[list[str], list[int], int, int]:
    run = _fit((2, 1, 2), 1)
    module, (optimizer,) = run.lightning_module, run.optimizers
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    share: Any = optimizer.sharded  # type: ignore[attr-defined]
    wrong = [name for name, p in frozen.items() if p.grad is not None or p in set(share.parameters)]
    state = sum(
        value.numel()
        for entry in optimizer.state.values()
        for value in entry.values()
        if torch.is_tensor(value) and value.dim()
    )
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert frozen and all("lora" not in name for name in frozen)
    return wrong, module.products, state, trained


def test_frozen_weights_cost_no_gradient_state_or_product(pools: Pools) -> None:
    for wrong, products, state, trained in pools(2).run(_frozen):
        assert not wrong
        # In each of two layers and for each of two projections: the rows' gradient through the weight, and through each factor
        # that and the factor's own. The weights' own would be one more.
        assert products == [2 * 2 * (1 + 2 + 2)] * 2
        assert (
            state <= 2 * trained
        )  # Adam's averages; a whole factor's are shared out over data ranks, of which there is one


# -- checkpoints -----------------------------------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "directory": {},
    "async": {"async_save": True},
    "file": {"save_distributed_checkpoint": False},
}


@pytest.mark.parametrize("form", FORMS)
def test_runs_go_on_from_adapters_alone(pools: Pools, tmp_path: Path, form: str) -> None:
    path, options = tmp_path / "it.ckpt", {"exclude_frozen_parameters": True, **FORMS[form]}
    whole = pools(4).run(_continued, path, options)
    for straight, resumed in whole:
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    if form != "async":
        moved = pools(2).run(_resumed, (2, 1, 2) if form == "file" else (1, 2, 1), path, options)
        assert_same_everywhere(moved)
        assert_close(moved[0], whole[0][0], 2e-5)


def _continued(path: Path, options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    straight = _weights(TP2EP2, 2, **options)
    run = _fit(TP2EP2, 1, saved=path, **options)
    names = _names_in(path)
    assert {n.removeprefix("model.") for n in names} == {
        n for n, p in run.lightning_module.model.named_parameters() if p.requires_grad
    }
    return straight, _weights(TP2EP2, 2, resumed=path, **options)


def _names_in(path: Path) -> set[str]:
    if path.is_dir():
        return {tensor["name"] for tensor in describe(path, tensors=True)["tensors"] if tensor["part"] == "model"}
    return set(torch.load(path, weights_only=False)["state_dict"])


def _resumed(sizes: tuple[int, int, int], path: Path, options: dict[str, Any]) -> dict[str, Tensor]:
    return _weights(sizes, 2, resumed=path, **options)


def test_nothing_but_frozen_parameters_may_be_missing(pools: Pools, tmp_path: Path) -> None:
    for without, unfrozen in pools(2).run(_missing, tmp_path / "it.ckpt"):
        assert "lacks frozen parameters ('model." in without and "`exclude_frozen_parameters=True`" in without
        assert "Missing key" in unfrozen and "input_layernorm" in unfrozen and "embed_tokens" not in unfrozen


def _missing(path: Path) -> list[str]:
    _fit((2, 1, 2), 1, saved=path, exclude_frozen_parameters=True)
    messages = []
    for module, exclude in ((Adapted(), False), (Adapted("input_layernorm"), True)):
        try:
            _fit((2, 1, 2), 2, module, path, exclude_frozen_parameters=exclude)
        except (CheckpointError, RuntimeError) as error:
            messages.append(str(error))
    return messages


class Frozen(Adapted):
    """Part of a model is frozen, without adapters."""

    def __init__(self) -> None:
        L.LightningModule.__init__(self)
        self.model, self.lr, self.products = build("qwen3_moe").train(), 0.01, []
        self.model.get_input_embeddings().requires_grad_(False)


def _exported(path: Path) -> dict[str, Tensor]:
    run = _fit((2, 1, 2), 1, Frozen(), exclude_frozen_parameters=True)
    assert "model.model.embed_tokens.weight" not in run.strategy.lightning_module_state_dict()
    run.strategy.save_pretrained(path)  # type: ignore[attr-defined]
    return whole_weights(run)


def test_an_export_is_whole(pools: Pools, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    weights, _ = pools(2).run(_exported, tmp_path / "exported")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    assert_same_everywhere([weights, {f"model.{name}": tensor for name, tensor in read.items()}])


# -- models without storage ------------------------------------------------------------------------------------------------


class Read(L.LightningModule):
    """Adapters of a model whose weights are read part by part."""

    def __init__(self, folder: str, **options: Any) -> None:
        super().__init__()
        self.folder, self.options = folder, options

    def configure_model(self) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        if not hasattr(self, "model"):
            chosen = {"r": 4, "target_modules": ATTENTION, "target_parameters": EXPERTS["qwen3_moe"]} | self.options
            self.model = get_peft_model(from_pretrained(AutoModelForCausalLM, self.folder), LoraConfig(**chosen))

    test_step = training_step = Adapted.training_step
    configure_optimizers = Adapted.configure_optimizers
    lr = 0.01


def _read(folder: str, options: dict[str, Any]) -> dict[str, Tensor] | str:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has no (weights|use) for")
        run = trainer("tp2 ep2")
        try:
            run.test(Read(folder, **options), _tokens(2), verbose=False)
        except UnsupportedError as error:
            return str(error)
    return whole_weights(run)


def test_weights_below_adapters_are_read_part_by_part(pools: Pools, tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path)
    want = build("qwen3_moe").state_dict()
    for kind in (True, "gaussian"):
        ranks = pools(4).run(_read, str(tmp_path), {"init_lora_weights": kind, "bias": "all"})
        assert_same_everywhere(ranks)
        factors = {name: tensor for name, tensor in ranks[0].items() if "lora" in name}
        others = {plain_name(name): tensor for name, tensor in ranks[0].items() if "lora" not in name}
        assert others.keys() == {f"model.base_model.model.{name}" for name in want}
        for name, tensor in want.items():
            assert torch.equal(others[f"model.base_model.model.{name}"], tensor), name
        assert len(factors) == 2 * 2 * (4 + 2)
        for name, tensor in factors.items():
            assert ("lora_B" in name) == (float(tensor.abs().max()) == 0), name
            if "lora_A" in name and kind == "gaussian":
                assert 0.15 < float(tensor.std()) < 0.35, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"init_lora_weights": "orthogonal", "target_parameters": None},
            "`init_lora_weights='orthogonal'` looks at the weights",
        ),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save` has copied a"),
    ],
    ids=["initialisation", "copy"],
)
def test_adapters_that_look_at_weights_which_are_not_there_are_refused(
    pools: Pools, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    build("qwen3_moe").save_pretrained(tmp_path)
    for found in pools(4).run(_read, str(tmp_path), options):
        assert isinstance(found, str) and message in found


# -- recomputation ---------------------------------------------------------------------------------------------------------


def test_recomputation_changes_no_bit_and_need_not_communicate(pools: Pools) -> None:
    plain, recomputed, by_itself = pools(4).run(_recomputed)[0]
    assert_same_everywhere([plain, recomputed, by_itself])


def _recomputed() -> list[dict[str, Tensor]]:
    found = [_weights(TP2EP2, 1)]
    for checkpointing in (False, True):
        run = _fit(TP2EP2, 1, Adapted(checkpointing=checkpointing), activation_checkpointing="comm_aware")
        calls = run.strategy.communication.calls_by
        assert calls and not [key for key in calls if key.phase == "recomputation"]
        found.append(whole_weights(run))
    return found
