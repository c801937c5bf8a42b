import warnings

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_ted.moe import Experts
from lightning_ted.moe.experts import _warn_slow, grouped_gemm_obstacle


def one_by_one(experts: Experts, rows: Tensor, counts: list[int]) -> Tensor:
    acts = {"gelu": F.gelu, "relu": F.relu}
    outputs = []
    for number, piece in enumerate(rows.split(counts)):
        up = getattr(experts, experts.up_name)[number]
        hidden = F.linear(piece, up)
        if experts.down_proj_bias is not None:
            hidden = hidden + getattr(experts, f"{experts.up_name}_bias")[number]
        if experts.activation == "swiglu":
            gate, value = hidden.chunk(2, -1)
            hidden = F.silu(gate) * value
        else:
            hidden = acts[experts.activation](hidden)
        output = F.linear(hidden, experts.down_proj[number])
        outputs.append(output if experts.down_proj_bias is None else output + experts.down_proj_bias[number])
    return torch.cat(outputs)


@pytest.mark.parametrize("width", [16, 10], ids=["grouped", "one by one"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize("counts", [[3, 0, 4, 1], [0, 0, 8, 0], [0, 0, 0, 0]])
@pytest.mark.filterwarnings("ignore:The experts are multiplied one by one")
def test_experts_equal_a_loop_in_value_and_gradient(counts: list[int], activation: str, bias: bool, width: int) -> None:
    torch.manual_seed(0)
    experts = Experts(4, 8, width, activation, bias)  # type: ignore[arg-type]
    grads = []
    for function in (lambda rows: experts(rows, torch.tensor(counts)), lambda rows: one_by_one(experts, rows, counts)):
        torch.manual_seed(1)
        rows = torch.randn(sum(counts), 8, requires_grad=True)
        output = function(rows)
        grads.append(
            [output, *torch.autograd.grad(output.square().sum() + output.sum(), [rows, *experts.parameters()])]
        )
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("width", [16, 10], ids=["grouped", "one by one"])
@pytest.mark.filterwarnings("ignore:The experts are multiplied one by one")
def test_an_output_that_nobody_reads_has_the_same_gradients(width: int) -> None:
    torch.manual_seed(0)
    experts, rows, counts = (
        Experts(4, 8, width, bias=True),
        torch.randn(8, 8, requires_grad=True),
        torch.tensor([3, 0, 4, 1]),
    )
    wrt, grads = [rows, *experts.parameters()], []
    for is_read in (True, False):
        out = experts(rows, counts, None, is_read)
        assert is_read or torch.equal(
            out[:3], experts.down_proj_bias[:1].expand(3, -1)
        )  # the product itself is left out
        grads.append(torch.autograd.grad(out, wrt, torch.ones_like(out)))
    assert all(map(torch.equal, *grads))


def test_fallback_warns_once_and_names_the_reason() -> None:
    _warn_slow.cache_clear()
    experts = Experts(2, 6, 5, "relu")
    with pytest.warns(UserWarning, match="a row of 5 elements of torch.float32 is not a multiple of 16 bytes"):
        experts(torch.randn(3, 6), torch.tensor([1, 2]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        experts(torch.randn(3, 6), torch.tensor([1, 2]))


def test_obstacles_of_the_grouped_gemm() -> None:
    weight = torch.empty(2, 16, 8)
    assert grouped_gemm_obstacle(torch.float32, weight) is None
    assert "no kernel" in str(grouped_gemm_obstacle(torch.float64, weight))
    assert "16 bytes" in str(grouped_gemm_obstacle(torch.bfloat16, torch.empty(2, 12, 8)))


def test_experts_start_different_from_one_another() -> None:
    experts = Experts(4, 8, 16)
    assert not torch.equal(experts.down_proj[0], experts.down_proj[1])


@pytest.mark.parametrize(("argument", "value"), [("num_experts", 0), ("d_model", -1), ("d_ff", 2.5)])
def test_impossible_sizes_are_refused(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"`{argument}={value}` must be a positive whole number"):
        Experts(**{"num_experts": 2, "d_model": 4, "d_ff": 4, argument: value})  # type: ignore[arg-type]


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="`activation='tanh'` is unknown; choose one of swiglu, gelu, relu"):
        Experts(2, 4, 4, "tanh")  # type: ignore[arg-type]
