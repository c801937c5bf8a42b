"""What the planner predicts is what the recorder counts: the same calls and bytes, on every rank, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ted.collectives.recorder import CommRecorder
from lightning_ted.mesh import TEDMesh
from lightning_ted.moe import Routing, TopKRouter
from lightning_ted.moe.layer import moe_layers
from lightning_ted.optim.options import TrainingOptions
from lightning_ted.plan.experts import MoELayer
from lightning_ted.plan.model import Attention, Block, Embedding, FeedForward, Head, Model, Replicated, Stack
from lightning_ted.plan.options import Options, Widths
from lightning_ted.plan.volume import volume
from lightning_ted.recompute import RecomputeOptions, checkpoint_blocks
from lightning_ted.strategy.partition import partition_module
from tests.support.models import TinyConfig, TinyDecoder, TinyFFN
from tests.support.parity import GRID, Case
from tests.support.pool import Pools
from tests.support.reduced import training_of

#: Two nodes of at most two ranks, or more, so that a hierarchical exchange has something to cross.
RANKS_PER_NODE = 2


class DealingRouter(TopKRouter):
    """Deals a rank's assignments out to the experts in turn; scores, and so gradients, are the router's own."""

    def forward(self, tokens_TD: Tensor) -> Routing:
        routing = super().forward(tokens_TD)
        dealt_N = torch.arange(routing.expert_TK.numel()) % self.num_experts
        return replace(routing, expert_TK=dealt_N.view_as(routing.expert_TK))


@dataclass(frozen=True)
class Run:
    """A model, a layout and a way of training, as a recorder is to see them.

    Attributes:
        case: The layout and how it trains.
        batch, sequence: Sequences of a data-parallel rank's micro-batch, and the tokens of one.
        plan: Styles that replace those of the model's plan; None leaves a layer out.
        head: The planner's name of the head's style.
        shared_expert: Whether the MoE layer has one.
        autocast: Compute in bfloat16 with masters in 32 bits.
    """

    case: Case
    batch: int = 3
    sequence: int = 7
    plan: tuple[tuple[str, str | None], ...] = ()
    head: str = "replicated"
    shared_expert: bool = False
    autocast: bool = False
    widths: Widths = field(default_factory=Widths)

    def build(self) -> TinyDecoder:
        module = TinyDecoder(self.case.config)
        for layer in moe_layers(module).values():
            layer.router.__class__ = DealingRouter
            if self.shared_expert:
                layer.shared_expert = TinyFFN(self.case.config)
        module.tp_plan |= {pattern: style for pattern, style in self.plan if style is not None}
        for pattern, style in self.plan:
            if style is None:
                del module.tp_plan[pattern]
        return module.to(self.case.dtype)

    def planned(self, pattern: str) -> bool:
        return (pattern, None) not in self.plan

    def described(self) -> Model:
        config = self.case.config
        width, norm = config.width, Replicated((config.width, config.width))
        planned = self.planned("blocks.*.attention.o_proj")
        attention = Attention(width, config.heads, bias=True, head_norms=2, packed=config.packed, planned=planned)
        dense = FeedForward(width, config.hidden, bias=True, planned=self.planned("blocks.0.ffn.down_proj"))
        gated = config.activation == "swiglu"
        shared = None
        if self.shared_expert:
            shared = FeedForward(width, config.hidden, bias=True, planned=self.plan == SHARED)
        capacity = config.capacity_factor is not None
        experts = MoELayer(
            width, config.hidden, config.experts, config.top_k, gated, config.bias, shared, capacity=capacity
        )
        blocks = [Block((norm, attention, norm, ffn), config.dropout > 0) for ffn in (dense, experts)]
        embedding = Embedding(config.vocab, width, "rowwise" if config.vocab_parallel else "replicated")
        style = "parallel_loss" if config.vocab_parallel else self.head
        head = Head(width, config.vocab, style, tied=config.tied)  # type: ignore[arg-type]
        return Model((embedding, Stack(width, tuple(blocks)), norm, head))

    def options(self) -> Options:
        case, keep = self.case, self.case.recompute
        return Options(
            sequence_length=self.sequence,
            micro_batch=self.batch,
            accumulation=case.accumulate,
            sequence_parallel=case.mode == "sequence",
            duplicate_token_dropping=case.mode != "undropped",
            dispatcher=case.dispatcher,
            ranks_per_node=RANKS_PER_NODE,
            overlap_chunks=case.chunks,
            checkpointing=None if keep is None else keep.mode,
            policy="all" if keep is None else keep.keep,
            zero_stage=case.zero_stage,
            clip_by_norm=True,
            widths=self.widths,
        )


#: By key: calls and bytes, and what was kept.
Counts = tuple[dict[Any, tuple[int, int]], dict[Any, int]]


def counted(run: Run, mesh: TEDMesh) -> Counts:
    """What one optimizer step sends."""
    case = run.case
    torch.manual_seed(3)
    module = run.build()
    layouts = partition_module(module, mesh, case.options)
    checkpoint_blocks(module, case.recompute)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    working = {name: torch.bfloat16 for name, _ in module.named_parameters()} if run.autocast else {}
    options = TrainingOptions(case.zero_stage)
    training = training_of(module, mesh, layouts, optimizer, case.options, options, working)
    # In the first steps, gradients of whole parameters are compared besides: how often depends on the data.
    training.reducer.audit.is_pending = False
    tokens = torch.randint(case.config.vocab, (run.batch, run.sequence + 1))
    autocast = torch.autocast("cpu", torch.bfloat16) if run.autocast else nullcontext()
    with mesh.recording(CommRecorder()) as recorder:
        for index in range(case.accumulate):
            with autocast:
                _, loss = module.step(tokens)
            with nullcontext() if index == case.accumulate - 1 else training.reducer.blocked(), training.backward():
                loss.backward()
        optimizer.sharded.grad_norm()  # type: ignore[attr-defined]
        optimizer.step()
    training.close()
    calls = {tuple(key): (count, recorder.bytes_by[key]) for key, count in recorder.calls_by.items()}
    return calls, {key: size // run.case.accumulate for key, size in recorder.kept.items()}


def count_all(runs: Sequence[Run]) -> list[Counts]:
    """The counts of several runs; those of one topology share their process groups."""
    topologies = dict.fromkeys(run.case.topology for run in runs)
    meshes = {topology: TEDMesh(topology, ranks_per_node=RANKS_PER_NODE) for topology in topologies}
    return [counted(run, meshes[run.case.topology]) for run in runs]


def predicted(run: Run, rank: int) -> Counts:
    found = volume(run.described(), run.case.topology, run.options(), rank)
    return {tuple(key): (count, found.bytes[key]) for key, count in found.calls.items()}, dict(found.kept)


def differences(run: Run, rank: int, counts: Counts) -> dict[Any, Any]:
    """Where a prediction is not the count: what is predicted, and what was counted."""
    pairs = zip(predicted(run, rank), counts, strict=True)
    return {
        key: (expected.get(key), got.get(key))
        for expected, got in pairs
        for key in {*expected, *got}
        if expected.get(key) != got.get(key)
    }


#: Runs in one call of a pool.
TOGETHER = 10


def check(pools: Pools, runs: Sequence[Run]) -> None:
    pool = pools(runs[0].case.world)
    calls = [pool.run(count_all, list(runs[at : at + TOGETHER])) for at in range(0, len(runs), TOGETHER)]
    ranks = [[counts for rank in of_rank for counts in rank] for of_rank in zip(*calls, strict=True)]
    wrong = {
        f"{run}, rank {rank}": found
        for rank, counts in enumerate(ranks)
        for run, got in zip(runs, counts, strict=True)
        if (found := differences(run, rank, got))
    }
    assert not wrong, "\n".join(f"{where}:\n  (predicted, counted) {found}" for where, found in wrong.items())


RECOMPUTE = [
    None,
    RecomputeOptions("full"),
    RecomputeOptions("comm_aware"),
    RecomputeOptions("comm_aware", "default"),
    RecomputeOptions("comm_aware", "all_to_all"),
]


def varied(turn: int, case: Case, ways: int) -> list[Run]:
    """A layout trained in several ways: in activation checkpointing and all else, they take turns."""
    return [
        Run(
            replace(
                case,
                config=TinyConfig(top_k=1 + n % 2),
                recompute=RECOMPUTE[n % len(RECOMPUTE)],
                dispatcher=("all_to_all", "hierarchical")[n // 2 % 2],
                chunks=(1, 3)[n // 3 % 2],
                accumulate=1 + n // 4 % 2,
                zero_stage=1 + n // 5 % 2,
            ),
            batch=(3, 2)[n // 3 % 2],
            sequence=(7, 8, 5)[n % 3],
        )
        for n in range(ways * turn, ways * (turn + 1))
    ]


#: In how many ways a layout is trained, and of how many layouts one is: of larger worlds, there are more.
WAYS = {2: (5, 1), 4: (1, 1), 8: (1, 3)}


@pytest.mark.parametrize("world", WAYS)
@pytest.mark.parametrize("mode", ["dtd", "undropped", "sequence"])
def test_prediction_is_the_count_on_every_layout(pools: Pools, world: int, mode: str) -> None:
    ways, step = WAYS[world]
    cases = [case for case in GRID if case.world == world and case.mode == mode][::step]
    check(pools, [run for turn, case in enumerate(cases) for run in varied(turn, case, ways)])


@pytest.mark.parametrize("mode", ["dtd", "undropped", "sequence"])
def test_prediction_is_the_count_however_activations_are_checkpointed(pools: Pools, mode: str) -> None:
    cases = [Case(4, 2, 2, etp, mode=mode, chunks=chunks) for etp, chunks in ((1, 1), (2, 3))]
    cases += [Case(4, 2, 1, 2, mode=mode), Case(4, 1, 4, dispatcher="hierarchical", chunks=3)]
    check(pools, [Run(replace(case, recompute=recompute)) for case in cases for recompute in RECOMPUTE[1:]])


GATHERED = (("head", "colwise_gather_output"),)
SHARED = tuple(
    (f"blocks.1.ffn.shared_expert.{name}_proj", style)
    for name, style in (("gate", "colwise"), ("up", "colwise"), ("down", "rowwise"))
)
UNPLANNED_FFN = tuple((f"blocks.0.ffn.{name}_proj", None) for name in ("gate", "up", "down"))
UNPLANNED_ATTENTION = (
    *((f"blocks.*.attention.{name}", None) for name in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "o_proj")),
    # A plan has to name something.
    *GATHERED,
)


def variants(case: Case) -> list[Run]:
    """Models of other parts, widths and numbers of tokens, under one layout."""

    def configured(**sizes: Any) -> Run:
        return Run(replace(case, config=TinyConfig(**sizes)))

    mixed = Widths(products=2, hidden=2, normed=2, weights=2, gradients=2)
    runs = [
        configured(vocab_parallel=True),
        configured(vocab_parallel=True, tied=True),
        configured(tied=True, packed=True),
        configured(activation="relu", bias=False, dropout=0.1),
        configured(capacity_factor=2.0),
        configured(experts=16, top_k=3),
        configured(width=64, hidden=768, experts=4, vocab=4200),  # several buckets
        Run(replace(case, dtype=torch.float64), widths=Widths.of(8)),
        Run(case, autocast=True, widths=mixed),
        Run(case, plan=GATHERED, head="gathered", shared_expert=True),
        Run(case, plan=SHARED, shared_expert=True),
        Run(case, plan=UNPLANNED_FFN),
        Run(case, batch=1, sequence=1),
    ]
    if case.mode != "sequence":
        runs.append(Run(case, plan=UNPLANNED_ATTENTION, head="gathered"))
    return [replace(run, case=replace(run.case, recompute=RECOMPUTE[n % len(RECOMPUTE)])) for n, run in enumerate(runs)]


@pytest.mark.parametrize("mode", ["dtd", "undropped", "sequence"])
def test_prediction_is_the_count_of_every_kind_of_part(pools: Pools, mode: str) -> None:
    check(pools, variants(Case(4, 2, 2, 2, mode=mode)))


@pytest.mark.parametrize("recompute", RECOMPUTE[1:3], ids=lambda options: options.mode)
def test_dropout_behind_a_layer_lets_it_be_recomputed_to_its_end(pools: Pools, recompute: RecomputeOptions) -> None:
    runs = [
        Run(Case(2, 2, 1, mode=mode, config=TinyConfig(dropout=dropout), recompute=recompute))
        for mode in ("dtd", "sequence")
        for dropout in (0.0, 0.1)
    ]
    check(pools, runs)
