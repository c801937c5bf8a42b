"""Mixture-of-experts models of Hugging Face's transformers train under every layout, with no code of the user's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ted import TEDStrategy
from lightning_ted.callbacks import ExpertBiasBalancing
from lightning_ted.callbacks.balancing import correction_biases
from lightning_ted.errors import LayoutError, PlanError, UnsupportedError
from lightning_ted.moe.losses import expert_counts
from lightning_ted.strategy.sizes import resolve_sizes
from tests.support.pool import Pools
from tests.support.runs import assert_close, assert_same_everywhere, trainer, whole_weights

pytest.importorskip("transformers")

from benchmarks.families import LAYOUTS, compare_all  # noqa: E402

#: One of each kind: plain, normed heads, sigmoid scores and latent attention, biases and interleaved gates, no gates, own plan.
FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "olmoe", "aria_text", "lfm2_moe"]
LARGER = ["qwen3_moe", "deepseek_v3", "gpt_oss"]
TOKENS = 8
NORM = "replicated_with_grad_allreduce"


@pytest.mark.parametrize(("world", "families"), [(2, FAMILIES), (4, LARGER)], ids=["2", "4"])
def test_families_train_like_one_process(pools: Pools, world: int, families: list[str]) -> None:
    for rows in pools(world).run(compare_all, families, LAYOUTS[world]):
        for family, row in zip(families, rows, strict=True):
            for found in row:
                assert not isinstance(found, str), f"{family}: {found}"
                assert found.logits < 1e-6 and found.gradient < 1e-5 and found.norm < 1e-6, f"{family}: {found}"


class Language(L.LightningModule):
    """As a user would write it."""

    def __init__(self, kind: str = "mixtral", late: bool = False, checkpointing: bool = False, **options: Any) -> None:
        super().__init__()
        self.kind, self.checkpointing, self.options = kind, checkpointing, options
        self.model: Any = None
        if not late:
            self.configure_model()

    def configure_model(self) -> None:
        if self.model is not None:
            return
        from transformers import AutoConfig, AutoModelForCausalLM

        from benchmarks.families import SMALL

        small = type(AutoConfig.for_model(self.kind))
        known = vars(small())
        options = {key: value for key, value in SMALL.items() if key in known} | self.options
        torch.manual_seed(5)
        self.model = AutoModelForCausalLM.from_config(small(**options))
        if self.checkpointing:
            self.model.activation_checkpointing_enable()
        self.model.train()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _tokens(batch_size: int) -> DataLoader:
    data = torch.randint(3, 64, (16, TOKENS), generator=torch.Generator().manual_seed(1))
    return DataLoader(data, batch_size=batch_size)  # type: ignore[arg-type]


def _fit(layout: str, module: L.LightningModule, batch_size: int, **options: Any) -> L.Trainer:
    run = trainer(layout, max_epochs=1, gradient_clip_val=0.5, **options)
    run.fit(module, _tokens(batch_size))
    return run


@pytest.mark.parametrize("late", [False, True], ids=["__init__", "configure_model"])
def test_fit_equals_ddp(pools: Pools, late: bool) -> None:
    results = pools(4).run(_without_auxiliary_loss, late)
    for ted, ddp in results:
        assert_close(ted, ddp, 1e-5)
    assert_same_everywhere([ted for ted, _ in results])


def _without_auxiliary_loss(late: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    ted = _fit("tp2 ep2", Language(late=late), 4)
    counts = expert_counts(ted.lightning_module)
    assert [int(count.sum()) for count in counts.values()] == [2 * 2 * 4 * TOKENS] * 2  # top-2, data ranks, batch
    return whole_weights(ted), whole_weights(_fit("ddp", Language(), 2))


def test_the_librarys_own_auxiliary_loss_is_kept(pools: Pools) -> None:
    ted = pools(4).run(_fit_weights, "tp2 ep2", 4)
    ddp = pools(2).run(_fit_weights, "ddp", 4)
    assert_close(ted[0], ddp[0], 1e-5)


def _fit_weights(layout: str, batch_size: int) -> dict[str, Tensor]:
    options = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
    return whole_weights(_fit(layout, Language(**options), batch_size))


def _recomputed(mode: str | None, by_itself: bool) -> tuple[dict[str, Tensor], dict[tuple[str, str], int]]:
    """Weights, and calls of one step by kind and phase."""
    run = L.Trainer(
        strategy=(
            strategy := TEDStrategy(tensor_parallel_size=2, expert_parallel_size=2, activation_checkpointing=mode)
        ),
        accelerator="cpu",
        devices=dist.get_world_size(),
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    strategy.record_communication = True
    run.fit(Language("qwen3_moe", checkpointing=by_itself), _tokens(4))
    calls: dict[tuple[str, str], int] = {}
    for key, number in strategy.communication.calls_by.items():
        calls[key.kind, key.phase] = calls.get((key.kind, key.phase), 0) + number
    return whole_weights(run), calls


@pytest.mark.parametrize("by_itself", [False, True], ids=["the strategy's", "the model's switch"])
def test_checkpointing_of_its_layers_changes_no_bit_and_need_not_communicate(pools: Pools, by_itself: bool) -> None:
    (plain, no), (full, all_again), (aware, none_again) = (
        pools(4).run(_recomputed, mode, by_itself and mode is not None)[0] for mode in (None, "full", "comm_aware")
    )
    assert_same_everywhere([plain, full, aware])
    assert all_again["all_to_all", "recomputation"] == no["all_to_all", "forward"]
    assert not [key for key in (*no, *none_again) if key[1] == "recomputation"]
    for kind in {kind for kind, _ in no}:
        assert [no.get((kind, phase)) for phase in ("forward", "backward")] == [
            none_again.get((kind, phase)) for phase in ("forward", "backward")
        ]


# -- plans -----------------------------------------------------------------------------------------------------------------


class Vision(Language):
    """Its library's plan forgets that the norms of queries and keys see this rank's heads only."""

    def configure_model(self) -> None:
        if self.model is not None:
            return
        from transformers import Qwen3VLMoeTextConfig, Qwen3VLMoeTextModel

        from benchmarks.families import SMALL

        known = vars(Qwen3VLMoeTextConfig())
        torch.manual_seed(5)
        self.model = Qwen3VLMoeTextModel(
            Qwen3VLMoeTextConfig(**{key: value for key, value in SMALL.items() if key in known})
        ).train()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch).last_hidden_state.square().mean()


def _wrong_plan() -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    message = ""
    try:
        _fit("tp2", Vision(), 4)
    except PlanError as error:
        message = str(error)
    repaired = {f"model.layers.*.self_attn.{n}_proj": "colwise" for n in ("q", "k", "v")}
    repaired |= {"model.layers.*.self_attn.o_proj": "rowwise"}
    repaired |= {f"model.layers.*.self_attn.{n}_norm": NORM for n in ("q", "k")}
    run = trainer("tp2", max_epochs=1, gradient_clip_val=0.5)
    run.strategy._options = replace(run.strategy._options, plan=repaired)
    run.fit(Vision(), _tokens(4))
    return message, whole_weights(run), whole_weights(_fit("ddp", Vision(), 2))


def test_a_wrong_plan_is_found_in_the_first_step_and_can_be_mended(pools: Pools) -> None:
    for message, ted, ddp in pools(4).run(_wrong_plan):
        assert "layers.1.self_attn.k_norm" in message or "layers.1.self_attn.q_norm" in message
        assert "replicated_with_grad_allreduce" in message
        assert_close(ted, ddp, 1e-5)


def test_more_tensor_ranks_than_heads_of_keys_are_refused() -> None:
    with pytest.raises(PlanError, match="`tensor_parallel_size=4` does not divide '.*num_key_value_heads' = 2"):
        resolve_sizes(Language(), 4, 4, 4, "auto", None, "expert_first", "auto")


def test_experts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(
        LayoutError, match="`expert_parallel_size=4` does not divide the 6 experts of MoE layer 'model.model"
    ):
        resolve_sizes(Language(num_local_experts=6), 4, 4, 1, 4, None, "expert_first", "auto")


@pytest.mark.parametrize("late", [False, True], ids=["__init__", "configure_model"])
def test_splitting_their_tokens_between_layers_is_refused(pools: Pools, late: bool) -> None:
    for message in pools(2).run(_split, late):
        assert "`sequence_parallel=True` splits tokens between the layers of 'model'" in message


def _split(late: bool) -> str:
    strategy = TEDStrategy(tensor_parallel_size=2, sequence_parallel=True)
    with pytest.raises(UnsupportedError) as error:
        L.Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False, max_steps=1).fit(
            Language(late=late), _tokens(4)
        )
    return str(error.value)


# -- balancing -------------------------------------------------------------------------------------------------------------


def _biases(layout: str, batch_size: int) -> dict[str, Tensor]:
    run = trainer(layout, max_epochs=2, max_steps=3, callbacks=[ExpertBiasBalancing(0.01)])
    run.fit(module := Language("deepseek_v3", num_key_value_heads=4, head_dim=4), _tokens(batch_size))
    return {name: bias.clone() for name, bias in correction_biases(module).items()}


def test_the_biases_of_a_family_that_has_them_are_moved(pools: Pools) -> None:
    (want,) = pools(1).run(_biases, "tp1", 8)
    assert len(want) == 2 and all(bias.abs().max() > 0 for bias in want.values())
    assert_same_everywhere([want, *pools(4).run(_biases, "tp2 ep2", 4)])
