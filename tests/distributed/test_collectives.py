"""Collectives as autograd functions."""

from __future__ import annotations

import torch
import torch.distributed as dist

from lightning_ted.collectives import expert, tensor, tokens
from lightning_ted.collectives.exchange import FlatExchange
from lightning_ted.collectives.primitives import all_extremes
from lightning_ted.collectives.recorder import CommRecorder
from lightning_ted.mesh import SINGLE, TEDMesh
from lightning_ted.topology import Topology
from tests.support.pool import Pools


def second_derivatives() -> list[str]:
    """What torch says of a double backward through each collective."""
    axis = TEDMesh(Topology(2, tensor=2)).axis("tensor")
    weight = torch.ones(4, 4, requires_grad=True)
    journey = expert.Journey(FlatExchange(axis, [2, 2], [2, 2]), SINGLE, None)
    functions = [
        lambda x: tensor.copy_to_shards(x, axis),
        lambda x: tensor.sum_shards(x, axis),
        lambda x: tensor.row_linear(x, weight, axis),
        lambda x: tensor.gather_features(x, axis),
        lambda x: tensor.split_features(x, axis),
        lambda x: tensor.gather_tokens_to_shards(x, 0, [4, 4], axis),
        lambda x: tensor.row_linear_to_tokens(x, weight, [2, 2], axis),
        lambda x: tokens.drop(x, axis),
        lambda x: tokens.restore(x, 8, axis),
        lambda x: expert.send_out(x, journey)(),
        lambda x: expert.send_back(x, journey)(),
    ]
    said = []
    for function in functions:
        x = torch.randn(4, 4, requires_grad=True)
        (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        try:
            grad.sum().backward()
            said.append("nothing")
        except RuntimeError as error:
            said.append(str(error))
    return said


def test_second_derivatives_are_refused(pools: Pools) -> None:
    for said in pools(2).run(second_derivatives):
        assert len(said) == 11
        assert all("differentiate twice" in text for text in said), said


def extremes() -> tuple[list[list[int]], int]:
    mesh = TEDMesh(Topology(2))
    with mesh.recording(CommRecorder()) as recorder:
        found = all_extremes(torch.tensor([[-3, 5, 2**55], [4, 5, -(2**55)]][dist.get_rank()]), mesh.axis("world"))
    return [numbers.tolist() for numbers in found], sum(recorder.calls.values())


def test_largest_and_smallest_come_by_one_collective(pools: Pools) -> None:
    assert pools(2).run(extremes) == [([[4, 5, 2**55], [-3, 5, -(2**55)]], 1)] * 2
