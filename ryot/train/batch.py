"""What one training step learns from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of one step, or a share of them; int64 [B, T] where nothing else is said."""

    inputs_BT: Tensor
    targets_BT: Tensor
    """Where documents are packed, -100 where nothing is learned."""
    documents_BT: Tensor | None = None
    """Which positions belong together; None where all of a sequence do."""
    taught_ids_BTS: Tensor | None = None
    """Tokens that a teacher gives probabilities of."""
    taught_BTS: Tensor | None = None
    """Those probabilities, float32."""

    def chunk(self, count: int) -> list[Batch]:
        """As many equal shares."""
        inputs, targets = self.inputs_BT.chunk(count), self.targets_BT.chunk(count)
        others = [(None,) * count if t is None else t.chunk(count) for t in self._others]
        return [Batch(x, y, *more) for x, y, *more in zip(inputs, targets, *others)]

    def to(self, device: str) -> Batch:
        """The same on a device."""
        others = (None if t is None else t.to(device) for t in self._others)
        return Batch(self.inputs_BT.to(device), self.targets_BT.to(device), *others)

    @property
    def num_learned(self) -> int | None:
        """Positions that something is learned from; None where all are."""
        return None if self.documents_BT is None else int((self.targets_BT >= 0).sum())

    @property
    def _others(self) -> tuple[Tensor | None, ...]:
        return self.documents_BT, self.taught_ids_BTS, self.taught_BTS
