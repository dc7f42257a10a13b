"""What tells one exported artifact of a run from another."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True, slots=True)
class ArtifactId:
    """One training of one variant, exported in one precision."""

    variant: str
    seed: int
    precision: str
    device: str = ""
    """Where it was measured, in a report of several devices."""

    def __str__(self) -> str:
        """`optimized/seed-0/int8-dyn`, and `@DEVICE` where there is one: what reports and messages call it."""
        return f"{self.variant}/seed-{self.seed}/{self.precision}" + (f"@{self.device}" if self.device else "")

    @classmethod
    def parse(cls, text: str) -> ArtifactId:
        """The id that `str` gave; raises `ValueError` for any other text. Files of older versions hold ids as text."""
        variant, seed, precision = text.rsplit("/", 2)
        precision, _, device = precision.partition("@")
        if not seed.startswith("seed-"):
            raise ValueError(f"{text!r} is not VARIANT/seed-K/PRECISION")
        return cls(variant, int(seed.removeprefix("seed-")), precision, device)
