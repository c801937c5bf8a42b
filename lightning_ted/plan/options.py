"""How a model is trained: what the strategy's arguments, the Trainer's and the data say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lightning_ted.errors import TEDError
from lightning_ted.plan.traffic import KEEP_POLICIES, KeepPolicy


def require_whole(owner: str, **numbers: int) -> None:
    """Refuse what is no whole number from 1 on.

    Raises:
        TEDError: Naming the argument and its value.

    """
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise TEDError(f"`{owner}({name}={number!r})` must be a whole number from 1 on.")


def require_choice(owner: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse what is none of the choices.

    Raises:
        TEDError: Naming the argument, its value and the choices.

    """
    if value not in choices:
        raise TEDError(f"`{owner}({name}={value!r})` is unknown; choose one of {', '.join(map(repr, choices))}.")


@dataclass(frozen=True)
class Widths:
    """Bytes of one number.

    Attributes:
        products: What matrix multiplications read and make; under autocast, its dtype's.
        hidden: The hidden states between the blocks.
        normed: What norms hand to the layers behind them; under autocast, devices differ in it.
        weights: The weights to compute with.
        gradients: In which they are accumulated and reduced.

    """

    products: int = 4
    hidden: int = 4
    normed: int = 4
    weights: int = 4
    gradients: int = 4

    def __post_init__(self) -> None:
        require_whole("Widths", **self.__dict__)

    @classmethod
    def of(cls, width: int) -> Widths:
        """One width for all."""
        return cls(width, width, width, width, width)

    @property
    def statistics(self) -> int:
        """Of the router's scores, which are made in 32 bits at least."""
        return max(4, self.normed)

    @property
    def logits(self) -> int:
        """Of the logits in a loss, in 32 bits at least."""
        return max(4, self.products)


@dataclass(frozen=True)
class Options:
    """How one optimizer step is made.

    Attributes:
        sequence_length: Tokens of a sequence, as the blocks see it.
        micro_batch: Sequences of one data-parallel rank in one forward.
        accumulation: Micro-batches of one step.
        sequence_parallel: Split hidden states over tokens between the tensor-parallel regions of a stack.
        duplicate_token_dropping: Tensor ranks dispatch only their share of the tokens.
        dispatcher: ``"all_to_all"`` or ``"hierarchical"``.
        ranks_per_node: Consecutive ranks that share a node; None for all. Of a hierarchical dispatcher.
        overlap_chunks: In how many chunks tokens travel to their experts.
        checkpointing: Activation checkpointing of the blocks of stacks: None, ``"full"`` or ``"comm_aware"``.
        policy: What ``"comm_aware"`` keeps.
        zero_stage: 1 or 2, which send the same.
        auxiliary_loss: Whether the loss holds the auxiliary losses of MoE layers.
        clip_by_norm: Whether the norm of the gradient is asked for.
        widths: Bytes of one number.

    """

    sequence_length: int
    micro_batch: int = 1
    accumulation: int = 1
    sequence_parallel: bool = False
    duplicate_token_dropping: bool = True
    dispatcher: str = "all_to_all"
    ranks_per_node: int | None = None
    overlap_chunks: int = 1
    checkpointing: Literal["full", "comm_aware"] | None = None
    policy: KeepPolicy = "all"
    zero_stage: int = 1
    auxiliary_loss: bool = True
    clip_by_norm: bool = False
    widths: Widths = field(default_factory=Widths)

    def __post_init__(self) -> None:
        sizes = ("sequence_length", "micro_batch", "accumulation", "overlap_chunks")
        require_whole("Options", **{name: getattr(self, name) for name in sizes})
        if self.ranks_per_node is not None:
            require_whole("Options", ranks_per_node=self.ranks_per_node)
        require_choice("Options", "dispatcher", self.dispatcher, ("all_to_all", "hierarchical"))
        require_choice("Options", "checkpointing", self.checkpointing, (None, "full", "comm_aware"))
        require_choice("Options", "policy", self.policy, KEEP_POLICIES)
        require_choice("Options", "zero_stage", self.zero_stage, (1, 2))

    @property
    def keeps(self) -> str | None:
        """What regions keep, a key of the policies; None without regions."""
        return self.policy if self.checkpointing == "comm_aware" else self.checkpointing
