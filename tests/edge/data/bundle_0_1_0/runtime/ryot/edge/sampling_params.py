"""How tokens are drawn, as plain data: apart from the drawing, which needs numpy where greedy text needs none."""

from __future__ import annotations

from dataclasses import dataclass

from ryot.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How a token is drawn; the defaults are greedy."""

    temperature: float = 0.0
    """Logits are divided by it; 0 takes the best token."""
    top_k: int = 0
    """Keep the k best tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest best tokens whose probabilities add up to this; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens of at least this share of the best one's probability; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Logits of tokens already seen, prompt included, are divided by it where positive, else multiplied; 1 is none."""
    seed: int = 0
    """Same seed, same logits: same tokens."""

    def __post_init__(self) -> None:
        rules = (
            ("temperature", self.temperature >= 0, "a number not below 0"),
            ("top_k", self.top_k >= 0, "a whole number not below 0"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "a number from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "a number above 0"),
            ("seed", self.seed >= 0, "a whole number not below 0"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected {rule}")

    @property
    def greedy(self) -> bool:
        """Whether the runtime's own ArgMax gives the token."""
        return self.temperature == 0 and self.repetition_penalty == 1
