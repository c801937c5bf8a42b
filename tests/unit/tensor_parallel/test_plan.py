import pytest
from torch import nn

from lightning_ted.errors import PlanError
from lightning_ted.tensor_parallel import STYLES, Style, expand_plan
from lightning_ted.tensor_parallel.plan import collect_plan


def model() -> nn.Module:
    inner = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(2)])})
    inner.tp_plan = {"layers.*.q": "colwise"}  # type: ignore[assignment]
    return nn.ModuleDict({"inner": inner, "head": nn.Linear(4, 4)})


def test_star_is_one_segment() -> None:
    assert set(expand_plan(model(), {"inner.layers.*.q": "colwise"})) == {"inner.layers.0.q", "inner.layers.1.q"}
    with pytest.raises(PlanError, match="matches no module or parameter"):
        expand_plan(model(), {"inner.*.q": "colwise"})


def test_plans_of_inner_modules_get_their_prefix() -> None:
    assert collect_plan(model()) == {"inner.layers.*.q": "colwise"}


def test_later_patterns_win() -> None:
    styles = expand_plan(model(), {"inner.layers.*.q": "colwise", "inner.layers.1.q": "replicate"})
    assert [styles[f"inner.layers.{i}.q"].name for i in (0, 1)] == ["colwise", "replicate"]


def test_missing_layers_may_come_later() -> None:
    assert expand_plan(nn.ModuleDict(), {"inner.q": "colwise"}, complete=False) == {}


def test_parameters_can_be_named() -> None:
    assert set(expand_plan(model(), {"head.bias": "replicated_with_grad_allreduce"})) == {"head.bias"}


@pytest.mark.parametrize(
    ("text", "length", "blocks"),
    [("packed_colwise", 8, (4, 4)), ("packed_colwise:3", 9, (3, 3, 3)), ("packed_colwise:4,2,2", 8, (4, 2, 2))],
)
def test_blocks_of_packed_projections(text: str, length: int, blocks: tuple[int, ...]) -> None:
    assert Style.parse(text, "x").block_lengths(length, "x") == blocks


@pytest.mark.parametrize("text", ["columns", "colwise:2", "packed_colwise:0", "packed_colwise:a", ""])
def test_unknown_styles_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"`tensor_parallel_plan\['x'\]="):
        Style.parse(text, "x")


def test_every_style_is_described() -> None:
    assert all(STYLES.values())
