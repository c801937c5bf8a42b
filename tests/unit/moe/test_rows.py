"""Rows between token order and expert order."""

from __future__ import annotations

import pytest
import torch

from lightning_ted.moe.dispatch.order import Order, regroup
from lightning_ted.moe.rows import combine_rows, expand_tokens, permute_rows


def test_combining_undoes_expanding() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(7, 4, dtype=torch.double, requires_grad=True)
    expert_TK = torch.stack([torch.randperm(5)[:2] for _ in range(7)])
    order = Order.of(expert_TK, 5)
    weight = torch.full((7, 2), 0.5, dtype=torch.double, requires_grad=True)

    def there_and_back(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows = expand_tokens(tokens, order.order_N, order.position_TK, 14)
        return combine_rows(rows, weight, order.order_N, order.position_TK, 14)

    torch.testing.assert_close(there_and_back(tokens, weight), tokens)
    assert torch.autograd.gradcheck(there_and_back, (tokens, weight))


def test_rows_are_sorted_by_expert_and_keep_the_order_of_tokens() -> None:
    order = Order.of(torch.tensor([[2, 0], [0, 1], [2, 3]]), 3)  # 3: not routed
    assert order.order_N.tolist() == [1, 2, 3, 0, 4, 5]
    assert order.counts_CE.tolist() == [[2, 1, 2]]
    assert order.position_TK.flatten()[order.order_N].tolist() == list(range(6))


def test_regrouping_goes_from_source_to_expert_and_back() -> None:
    # Rows named source * 10 + expert, in order of arrival.
    arrived = torch.tensor([0, 0, 1, 10, 11, 11, 11, 21])
    index, inverse = regroup(torch.tensor([[2, 1], [1, 3], [0, 1]]), 8)
    grouped = arrived[index]
    assert grouped.tolist() == [0, 0, 10, 1, 11, 11, 11, 21]
    assert torch.equal(grouped[inverse], arrived)
    rows = torch.randn(8, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: permute_rows(rows, index, inverse), (rows,))


def available_memory() -> int:
    with open("/proc/meminfo") as file:
        sizes = dict(line.split(":") for line in file)
    return int(sizes["MemAvailable"].split()[0]) * 1024


def test_rows_beyond_32_bit_offsets() -> None:
    tokens, choices, width = 2, 2**20 + 1, 1024  # rows of more than 2^31 elements
    if available_memory() < 4 * 2**30:
        pytest.skip("needs 4 GiB of free memory")
    tokens_TD = torch.arange(1, tokens + 1, dtype=torch.int8)[:, None].expand(-1, width)
    rows = tokens * choices
    order_N = torch.arange(rows - 1, -1, -1)
    rows_ND = expand_tokens(tokens_TD, order_N, order_N.view(tokens, choices), rows)
    for row in (0, choices - 1, choices, choices + 1, rows - 1):
        assert rows_ND[row].tolist() == [tokens - row // choices] * width
