"""An embedding whose vocabulary is cut over the tensor ranks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ted.collectives.tensor import sum_shards
from lightning_ted.errors import PlanError
from lightning_ted.mesh import Axis
from lightning_ted.tensor_parallel.ranges import require_range


class VocabParallelEmbedding(nn.Embedding):
    """Each rank looks up the tokens of its part of the vocabulary, zeros elsewhere; the sum is the embedding."""

    axis: Axis
    name: str

    @staticmethod
    def check(embedding: nn.Embedding, name: str) -> None:
        """Refuse what needs the whole vocabulary.

        Raises:
            PlanError: For ``max_norm``, ``scale_grad_by_freq`` and ``sparse``.

        """
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(embedding, option):
                raise PlanError(
                    f"'{name}' has `{option}={getattr(embedding, option)!r}`, which an embedding_rowwise embedding does not "
                    f"support; leave it out of the plan."
                )

    @classmethod
    def adopt(cls, embedding: nn.Embedding, axis: Axis, name: str) -> None:
        """Make ``embedding``, which has passed :meth:`check`, vocabulary-parallel; its weight is cut by the caller."""
        embedding.__class__ = cls
        embedding.axis, embedding.name = axis, name  # type: ignore[assignment]
        embedding.num_embeddings //= axis.size

    def forward(self, input: Tensor) -> Tensor:
        """``[...]`` token numbers to ``[..., embedding_dim]``.

        Raises:
            IndexError: If a number is not in the vocabulary.

        """
        require_range(input, self.num_embeddings * self.axis.size, f"token number for the embedding '{self.name}'")
        local = input - self.axis.rank * self.num_embeddings
        foreign = (local < 0) | (local >= self.num_embeddings)
        found = F.embedding(local.masked_fill(foreign, 0), self.weight, None)
        rows = found.masked_fill(foreign.unsqueeze(-1), 0)
        if self.padding_idx is not None:
            # The padding row is looked up but takes no gradient.
            rows = rows.where((input != self.padding_idx).unsqueeze(-1), rows.detach())
        return sum_shards(rows, self.axis)
