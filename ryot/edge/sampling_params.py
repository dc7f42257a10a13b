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
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens generated before, as OpenAI's API has it."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time that a token was generated before."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, and what is added to their logits."""
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
        return self.temperature == 0 and not self.changes_logits

    @property
    def uncut(self) -> bool:
        """Whether a token is drawn among all."""
        return self.temperature > 0 and not self.top_k and self.top_p >= 1 and not self.min_p

    @property
    def changes_logits(self) -> bool:
        """Whether anything is done to the logits before the temperature."""
        return self.repetition_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty or self.logit_bias)
