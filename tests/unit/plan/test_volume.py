"""The formulas against the paper's, by hand; and what a description may not say."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import pytest

from lightning_ted.errors import LayoutError, TEDError
from lightning_ted.plan import gradients, traffic
from lightning_ted.plan.experts import MoELayer
from lightning_ted.plan.model import Attention, Block, Embedding, FeedForward, Head, Model, Replicated, Stack
from lightning_ted.plan.options import Options, Widths
from lightning_ted.plan.place import shares
from lightning_ted.plan.traffic import Key
from lightning_ted.plan.volume import Volume, kept_memory, volume
from lightning_ted.topology import Topology

WIDTH, HIDDEN, EXPERTS, TOP_K, TOKENS = 64, 128, 16, 2, 512
NORM = Replicated((WIDTH,))
MOE = MoELayer(WIDTH, HIDDEN, EXPERTS, TOP_K)
DENSE = Block((NORM, Attention(WIDTH, 8), NORM, FeedForward(WIDTH, HIDDEN)))
SPARSE = Block((NORM, Attention(WIDTH, 8), NORM, MOE))
MODEL = Model((Embedding(1000, WIDTH), Stack(WIDTH, (DENSE, SPARSE) * 2), NORM, Head(WIDTH, 1000)))
OPTIONS = Options(sequence_length=128, micro_batch=4, widths=Widths.of(2))
#: Bytes of the counts that are exchanged in a forward or recomputation of the two MoE layers, over four expert ranks.
COUNTS = 2 * 8 * EXPERTS * 3 // 4


def sent(found: Volume, kind: str, *phases: str) -> int:
    return sum(size for key, size in found.bytes.items() if key.kind == kind and key.phase in phases)


def test_all_to_all_sends_every_row_to_where_its_expert_is() -> None:
    found = volume(MODEL, Topology(16, 1, 4), OPTIONS)
    # Each of the two layers sends three quarters of its rows to other ranks, and gets as many back.
    rows = 2 * 2 * TOKENS * TOP_K * WIDTH * 2 * 3 // 4
    assert found.bytes[Key("all_to_all", "expert", "forward")] == rows + COUNTS
    assert found.bytes[Key("all_to_all", "expert", "backward")] == rows


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_dropping_duplicates_divides_all_to_all_by_the_tensor_degree(tensor: int) -> None:
    # arXiv 2303.06318, section 5.1.
    topology = Topology(64, tensor, 4, tensor)
    with_it, without = (
        volume(MODEL, topology, replace(OPTIONS, duplicate_token_dropping=drops)) for drops in (True, False)
    )
    assert (sent(without, "all_to_all", "forward") - COUNTS) == tensor * (
        sent(with_it, "all_to_all", "forward") - COUNTS
    )
    assert sent(without, "all_to_all", "backward") == tensor * sent(with_it, "all_to_all", "backward")


@pytest.mark.parametrize("policy", traffic.KEEP_POLICIES)
def test_awareness_of_communication_removes_a_third_of_the_all_to_alls(policy: traffic.KeepPolicy) -> None:
    # arXiv 2303.06318, section 5.2: forward, recomputation and backward send the same; the second one no more.
    everything = ("forward", "recomputation", "backward")
    full, aware = (
        volume(MODEL, Topology(16, 2, 4, 2), replace(OPTIONS, checkpointing=mode, policy=policy))
        for mode in ("full", "comm_aware")
    )
    assert sent(full, "all_to_all", *everything) - 2 * COUNTS == 3 * sent(full, "all_to_all", "backward")
    assert sent(aware, "all_to_all", *everything) - COUNTS == 2 * sent(full, "all_to_all", "backward")


def test_only_what_is_not_kept_is_done_again() -> None:
    topology = Topology(16, 2, 4, 2)

    def again(mode: str, policy: str = "all") -> set[str]:
        options = replace(OPTIONS, checkpointing=mode, policy=policy)
        return {key.kind for key in volume(MODEL, topology, options).calls if key.phase == "recomputation"}

    assert again("comm_aware", "all") == set()
    assert again("comm_aware", "default") == {"all_gather"}
    assert again("comm_aware", "all_to_all") == {"all_gather", "all_reduce"}
    assert again("full") == {"all_gather", "all_reduce", "all_to_all", "reduce_scatter"}


def test_a_policy_that_keeps_more_kinds_keeps_them_instead_of_what_they_are_made_of() -> None:
    rows = 2 * TOKENS // 2 * TOP_K * WIDTH * 2  # a tensor rank's, of both MoE layers
    found = kept_memory(MODEL, Topology(16, 2, 4, 2), OPTIONS)
    assert found["all_to_all"] == {("all_to_all", "expert"): 2 * rows}
    sums = 6 * TOKENS * WIDTH * 2  # of four attentions and two dense networks
    assert found["default"] == {("all_to_all", "expert"): 2 * rows, ("all_reduce", "tensor"): sums}
    assert found["all"] == {
        ("all_to_all", "expert"): rows,
        ("all_gather", "expert_tensor"): 2 * rows,
        ("all_gather", "tensor"): 2 * TOKENS * WIDTH * 2,
        ("all_reduce", "tensor"): sums,
    }


def test_kept_bytes_are_those_of_one_micro_batch() -> None:
    options = replace(OPTIONS, checkpointing="comm_aware", accumulation=3)
    memory = kept_memory(MODEL, Topology(8, 2, 2, 2), options)["all"]
    found = volume(MODEL, Topology(8, 2, 2, 2), options)
    assert found.kept == memory


def test_one_rank_sends_nothing() -> None:
    found = volume(MODEL, Topology(1), replace(OPTIONS, checkpointing="full", clip_by_norm=True))
    assert found == Volume()


@pytest.mark.parametrize("axis", ["tensor", "expert", "data", "expert_data", "expert_tensor"])
def test_axis_of_one_rank_sends_nothing(axis: str) -> None:
    layouts = {
        "tensor": Topology(8, 1, 4),
        "expert": Topology(8, 2, 1, 2),
        "data": Topology(8, 8, 1, 8),
        "expert_data": Topology(8, 2, 4, 2),
        "expert_tensor": Topology(8, 2, 4, 1),
    }
    found = volume(MODEL, layouts[axis], replace(OPTIONS, checkpointing="full"))
    assert axis not in {key.axis for key in found.calls}


def test_sequence_parallelism_sends_what_tensor_parallelism_does() -> None:
    # arXiv 2205.05198, section 4.2.2: an all-reduce is a reduce-scatter and an all-gather.
    dense = Model((Stack(WIDTH, (DENSE,) * 3),))
    split, whole = (
        volume(dense, Topology(4, 4, 1, 4), replace(OPTIONS, sequence_parallel=split)) for split in (True, False)
    )
    inside = sum(size for key, size in split.bytes.items() if key.axis == "tensor")
    ends = 2 * TOKENS // 4 * WIDTH * 2 * 3
    assert inside - ends == sum(size for key, size in whole.bytes.items() if key.axis == "tensor")


def test_all_micro_batches_of_a_step_share_one_reduction() -> None:
    one, three = (volume(MODEL, Topology(8, 2, 2, 2), replace(OPTIONS, accumulation=k)) for k in (1, 3))
    once = {key: size for key, size in one.bytes.items() if key.axis in ("data", "expert_data")}
    assert three.bytes[Key("all_to_all", "expert", "forward")] == 3 * one.bytes[Key("all_to_all", "expert", "forward")]
    for kind, phase in (("reduce_scatter", "backward"), ("all_gather", "optimizer")):
        for axis in ("data", "expert_data"):
            key = Key(kind, axis, phase)  # type: ignore[arg-type]
            assert three.bytes[key] == once[key] > 0


def test_gradients_are_sent_once_and_weights_once() -> None:
    # arXiv 1910.02054, section 7.1: each of the two moves all of a model, but this rank's share, once.
    model = Model((Replicated((32 * 8 * 1000,)),))
    found = volume(model, Topology(8), replace(OPTIONS, widths=Widths(weights=2, gradients=4)))
    assert found.bytes[Key("reduce_scatter", "data", "backward")] == 32 * 7 * 1000 * 4
    assert found.bytes[Key("all_gather", "data", "optimizer")] == 32 * 7 * 1000 * 2


def test_ranks_that_hold_one_token_more_send_more() -> None:
    options = Options(sequence_length=7)
    first, second = (volume(MODEL, Topology(4, 2, 2, 1), options, rank) for rank in (0, 1))
    key = Key("all_gather", "tensor", "forward")
    assert first.bytes[key] == 2 * 4 * WIDTH * 4
    assert second.bytes[key] == 2 * 3 * WIDTH * 4


def test_hierarchical_exchange_crosses_nodes_with_the_same_bytes_in_fewer_calls_to_others() -> None:
    # arXiv 2201.05596, section 5.2: what crosses is what a flat exchange sends to other nodes.
    options = replace(OPTIONS, dispatcher="hierarchical", ranks_per_node=4)
    flat = volume(MODEL, Topology(16, 1, 8), OPTIONS).bytes[Key("all_to_all", "expert", "backward")]
    found = volume(MODEL, Topology(16, 1, 8), options).bytes
    assert found[Key("all_to_all", "expert_across", "backward")] == flat * 4 // 7
    assert found[Key("all_to_all", "expert_inside", "backward")] == flat * 6 // 7


def test_hierarchical_exchange_within_a_node_is_a_flat_one() -> None:
    options = replace(OPTIONS, dispatcher="hierarchical", ranks_per_node=8)
    assert volume(MODEL, Topology(8, 1, 4), options) == volume(MODEL, Topology(8, 1, 4), OPTIONS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Embedding(0, 8), r"`Embedding\(vocabulary=0\)` must be a whole number"),
        (lambda: Embedding(8, 8, "colwise"), r"`Embedding\(style='colwise'\)` is unknown; choose one of 'replicated'"),
        (lambda: Attention(8, 3), r"`Attention\(heads=3\)` does not divide `width=8`"),
        (lambda: Attention(8, 4, kv_heads=3), r"`Attention\(kv_heads=3\)` does not divide `heads=4`"),
        (lambda: FeedForward(8, True), r"`FeedForward\(hidden=True\)` must be a whole number"),
        (lambda: MoELayer(8, 8, 4, 5), r"`MoELayer\(top_k=5\)` must not exceed `experts=4`"),
        (lambda: Stack(8, ()), r"`Stack\(blocks=0\)` must be"),
        (lambda: Head(8, -1), r"`Head\(vocabulary=-1\)` must be"),
        (lambda: Widths(products=0), r"`Widths\(products=0\)` must be"),
        (lambda: Options(0), r"`Options\(sequence_length=0\)` must be"),
        (lambda: Options(8, overlap_chunks=0), r"`Options\(overlap_chunks=0\)` must be"),
        (lambda: Options(8, ranks_per_node=0), r"`Options\(ranks_per_node=0\)` must be"),
        (lambda: Options(8, dispatcher="ring"), r"`Options\(dispatcher='ring'\)` is unknown; choose one of"),
        (lambda: Options(8, checkpointing="some"), r"`Options\(checkpointing='some'\)` is unknown"),
        (lambda: Options(8, policy="none"), r"`Options\(policy='none'\)` is unknown; choose one of 'all'"),
        (lambda: Options(8, zero_stage=3), r"`Options\(zero_stage=3\)` is unknown; choose one of 1, 2"),
    ],
)
def test_wrong_description_is_refused_by_name(make: object, message: str) -> None:
    with pytest.raises(TEDError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("part", "topology", "message"),
    [
        (Attention(48, 3), Topology(2, 2, 1, 2), r"`tensor_parallel_size=2` does not divide the heads of attention, 3"),
        (Attention(48, 4, kv_heads=1), Topology(2, 2), r"does not divide the heads of keys and values, 1"),
        (FeedForward(8, 7), Topology(2, 2), r"does not divide the hidden width of a feed-forward network, 7"),
        (Embedding(7, 8, "rowwise"), Topology(2, 2), r"does not divide the vocabulary, 7"),
        (Head(8, 7, "gathered"), Topology(2, 2), r"does not divide the vocabulary, 7"),
        (MoELayer(8, 8, 3), Topology(2, 1, 2), r"`expert_parallel_size=2` does not divide the number of experts, 3"),
        (MoELayer(8, 7, 4), Topology(2, 2, 1, 2), r"`expert_tensor_parallel_size=2` does not divide the hidden width"),
        (MoELayer(7, 8, 4, bias=True), Topology(2, 2, 1, 2), r"which cuts the experts' bias, 7"),
    ],
)
def test_layout_that_does_not_divide_a_size_is_refused(part: object, topology: Topology, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        volume(Model((part,)), topology, Options(8))  # type: ignore[arg-type]


def test_unplanned_attention_is_refused_where_it_would_see_a_share_of_the_sequence() -> None:
    stack = Stack(WIDTH, (Block((Attention(WIDTH, 8, planned=False), FeedForward(WIDTH, HIDDEN))),))
    options = replace(OPTIONS, sequence_parallel=True)
    with pytest.raises(TEDError, match=r"`Attention\(planned=False\)` in a stack with `sequence_parallel=True`"):
        volume(Model((stack,)), Topology(2, 2), options)


def test_numbers_are_those_of_the_code_that_communicates() -> None:
    from lightning_ted.collectives import tape, tokens
    from lightning_ted.optim import placement, reducer

    assert gradients.AXES == reducer.FAMILY_AXES
    assert (gradients.LARGEST, gradients.SMALLEST, gradients.BUCKETS, gradients.ALIGNMENT) == (
        reducer.BUCKET_SIZE,
        reducer._SMALL_BUCKET,
        reducer._BUCKETS,
        placement.ALIGNMENT,
    )
    assert {**traffic.KEPT, "choices": traffic.KEPT["full"]}.items() >= tape._KEPT.items()
    assert all(shares(n, parts) == tokens.shares(n, parts) for n in range(9) for parts in range(1, 5))


def test_ten_thousand_ranks_take_milliseconds() -> None:
    blocks = tuple(
        Block((NORM, Attention(4096, 32), NORM, ffn))
        for ffn in (FeedForward(4096, 16384), MoELayer(4096, 16384, 128)) * 16
    )
    model = Model((Embedding(50000, 4096), Stack(4096, blocks), NORM, Head(4096, 50000)))
    options = Options(2047, checkpointing="comm_aware", dispatcher="hierarchical", ranks_per_node=8, overlap_chunks=4)
    begin = time.process_time()
    found = volume(model, Topology(10240, 8, 128, 8), options, rank=9999)
    assert time.process_time() - begin < 0.5
    assert Counter(key.axis for key in found.calls)["expert_data"] == 2
