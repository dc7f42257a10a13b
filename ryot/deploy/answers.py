"""What quantization does to answers: questions in a checkpoint's own chat template, and what float32 says to them.

    # T tokens of a question and its answer, A of the answer alone, V vocabulary

Held-out text has no chat in it, so an error that only a template's tokens meet does not show in its bits per byte. The
float32 decoder answers a few questions greedily; an artifact reads the same tokens, and its distribution of each token
of an answer is held against float32's. A token that float32 is sure of and the artifact replaces is a lost one. One
that had a rival nearly as likely is not: any rounding may turn that. SmolLM2-135M begins "The capital of France is
Paris." with 15.2 % for its first token and 14.0 % for another.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ryot.deploy.quality import Scorer
from ryot.edge.bundle import TOKENIZER_NAME
from ryot.edge.chat import has_chat_template, load_chat_template
from ryot.edge.tokenizer import Tokenizer
from ryot.errors import ConfigError

log = logging.getLogger(__name__)

#: What is asked. Questions of one kind have as many tokens as each other in most vocabularies, and those are answered
#: together: float32 reads all its weights for each token, 50 ms at 135 M parameters.
QUESTIONS = (
    *(f"What is the capital of {country}?" for country in ("France", "Japan", "Italy", "Egypt")),
    *(f"Name three {things}." for things in ("colors", "animals", "cities", "languages")),
)
ANSWER_TOKENS = 12
#: Float32 is sure of a token that it finds e times as likely as any other.
SURE_NATS = 1.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A question, the answer that the float32 decoder gave, and how likely it found each of its tokens."""

    ids_T: NDArray[np.int64]
    """Without the last token, after which nothing is asked."""
    log_p_AV: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerLoss:
    """What an artifact makes of float32's answers."""

    tokens: int = 0
    """Of all answers; 0 where there is no chat template, and nothing was asked."""
    kl: float = 0.0
    """Mean KL divergence from float32's distribution, nats per token."""
    lost: int = 0
    """Tokens that float32 is sure of and the artifact replaces."""

    def reason(self, max_kl: float) -> str:
        """Why an artifact with these answers is not to be used; empty if it is."""
        if self.lost:
            return f"{self.lost} of {self.tokens} tokens of answers are others than those that float32 is sure of"
        if self.kl > max_kl:
            return f"KL of answers {self.kl:.4f} nats per token, limit {max_kl:.4f}"
        return ""


def chat_prompts(folder: Path, room: int) -> list[list[int]]:
    """Token ids of the questions in a checkpoint's chat template, those that leave `room` tokens for an answer.

    None without a chat template, or with one that refuses a plain question or cannot be tried.
    """
    tokenizer = Tokenizer(folder / TOKENIZER_NAME)
    if not has_chat_template(folder, tokenizer.config):
        return []
    try:
        template = load_chat_template(folder, tokenizer.config)
        texts = [template.render([{"role": "user", "content": question}]) for question in QUESTIONS]
    except ConfigError:
        return []  # was warned of when the text was checked
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return [ids for ids in prompts if 0 < len(ids) <= room]


def answer_greedily(reference: Scorer, prompts: Sequence[Sequence[int]], eos: Collection[int]) -> list[Answer]:
    """What the reference says to each prompt, up to `ANSWER_TOKENS` tokens or the end of the answer."""
    lengths = dict.fromkeys(map(len, prompts))
    return [a for n in lengths for a in _answer_together(reference, [p for p in prompts if len(p) == n], eos)]


def _answer_together(reference: Scorer, prompts: Sequence[Sequence[int]], eos: Collection[int]) -> list[Answer]:
    """The answers to prompts of one length."""
    ids_BT = new_BT = np.array(prompts, dtype=np.int64)
    past, rows = None, []
    for _ in range(ANSWER_TOKENS):
        logits, past = reference.run(new_BT, past)
        rows.append(F.log_softmax(torch.from_numpy(logits[:, -1]), dim=-1))
        new_BT = rows[-1].argmax(dim=-1, keepdim=True).numpy()
        ids_BT = np.concatenate((ids_BT, new_BT), axis=1)
    answers = []
    for ids_T, log_p_AV in zip(ids_BT, torch.stack(rows, dim=1)):
        start = ids_BT.shape[1] - ANSWER_TOKENS
        ends = np.flatnonzero(np.isin(ids_T[start:], list(eos)))
        count = int(ends[0]) + 1 if len(ends) else ANSWER_TOKENS
        answers.append(Answer(ids_T[: start + count - 1], log_p_AV[:count]))
    return answers


def judge_answers(answers: Sequence[Answer], artifact: Scorer) -> AnswerLoss:
    """What the artifact makes of the answers when it reads them."""
    tokens, kl, lost = 0, 0.0, 0
    for answer in answers:
        expected_AV = answer.log_p_AV
        logits = artifact.run(answer.ids_T[None])[0][0, -len(expected_AV) :]
        found_AV = F.log_softmax(torch.from_numpy(logits), dim=-1)
        best = expected_AV.topk(2)
        sure_A = best.values[:, 0] - best.values[:, 1] >= SURE_NATS
        tokens += len(expected_AV)
        kl += float((expected_AV.exp() * (expected_AV - found_AV)).sum())
        lost += int((sure_A & (found_AV.argmax(dim=-1) != best.indices[:, 0])).sum())
    return AnswerLoss(tokens=tokens, kl=max(0.0, kl / max(1, tokens)), lost=lost)
