"""A training whose last steps reinforce: supervised first, on the tasks' own answers, then on the model's own.

A step: sample answers to some prompts with the edge engine and the weights as they are, judge them, learn from how each
differs from the others to its prompt. Prompts, seeds and weights say all that is sampled, so a training that goes on
from a checkpoint samples what it would have sampled anyway.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ryot.adaptation import RlvrConfig
from ryot.config import KernelPlan
from ryot.edge.tokenizer import Tokenizer
from ryot.edge.verifiers import build_verifier
from ryot.errors import ConfigError
from ryot.events import Event, PassEvent, ReinforceEvent
from ryot.mapping import Unchecked, read_mapping, to_mapping
from ryot.models.tensors import FloatArray
from ryot.reinforce.gates import RewardGates, StepFigures
from ryot.reinforce.grpo import (
    Batch,
    PolicyLoss,
    Weights,
    answer_logprobs,
    build_batch,
    group_advantages,
    policy_loss,
)
from ryot.reinforce.pass_at_k import estimate_pass_at_k
from ryot.reinforce.rollouts import Fleet, Group, LocalFleet, Policy, Sample
from ryot.reinforce.tasks import Task, load_tasks
from ryot.train.checkpoint import Text
from ryot.train.gates import check_step
from ryot.train.loop import Trainer, TrainJob
from ryot.train.model import Decoder
from ryot.train.teaching import Teacher

#: How often held-out prompts are tried on the way, beside before and after.
EVALS_ON_THE_WAY = 4
#: Rows of the engine, where more samples are asked for than that.
MAX_ROWS = 256
#: Prompts, the longest by their characters, whose tokens are counted.
LONGEST_LOOKED_AT = 50
_REFERENCE = "reference."

MakeFleet = Callable[[Policy, RlvrConfig, KernelPlan], Fleet]


def make_local_fleet(policy: Policy, rlvr: RlvrConfig, plan: KernelPlan) -> Fleet:
    """A fleet in this process."""
    rows = min(MAX_ROWS, rlvr.prompts_per_step * rlvr.samples_per_prompt)
    return LocalFleet(policy, rows=rows, threads=plan.threads, precision=rlvr.rollout_precision)


class Judged(NamedTuple):
    """Answers to some tasks, and what their verifiers said."""

    groups: list[Group]
    samples: list[list[Sample]]
    rewards: list[list[float]]
    passed: list[int]
    """Of each group, how many answers."""


class ReinforceTrainer(Trainer):
    """A `Trainer` with `variant.rlvr.steps` more steps behind the supervised ones."""

    def __init__(self, job: TrainJob, plan: KernelPlan, teacher: Teacher | None = None):
        super().__init__(job, plan, teacher)
        assert job.variant.rlvr is not None
        self.rlvr = job.variant.rlvr
        self.supervised_steps = self.num_steps
        self.num_steps += self.rlvr.steps
        self.make_fleet: MakeFleet = make_local_fleet
        tasks = load_tasks(self.rlvr.task, self.rlvr.sha256, answers=self.rlvr.answers)
        self._held_out = [task for task in tasks if task.split == "test"]
        train = [task for task in tasks if task.split == "train"]
        self._reinforced = [task for task in train if task.answer is None] or train
        self._tokenizer = Tokenizer(self.dataset.path / "tokenizer.json")
        self._check_lengths([*self._held_out, *self._reinforced])
        self._gates = RewardGates()
        self._fleet: Fleet | None = None
        self._reference: Decoder | None = None
        self._told: list[Event] = []

    def _check_lengths(self, tasks: Sequence[Task]) -> None:
        """Raise `ConfigError` where prompt and answer may not fit the context, before anything is trained."""
        longest = sorted((task.prompt for task in tasks), key=lambda prompt: -len(prompt))[:LONGEST_LOOKED_AT]
        most = max(len(self._prompt_ids(prompt)) for prompt in longest)
        context = self.job.variant.model.max_seq_len
        if most + self.rlvr.max_new_tokens > context:
            raise ConfigError(
                f"rlvr.max_new_tokens: got {self.rlvr.max_new_tokens}, and {self.rlvr.task} has a prompt of {most} "
                f"tokens, but the context has {context}",
                hint="a larger model.max_seq_len, or shorter answers",
            )

    def _prompt_ids(self, prompt: str) -> tuple[int, ...]:
        begin = self.dataset.token_ids.separator
        ids = self._tokenizer.encode(prompt, add_special_tokens=False)
        return tuple(ids) if begin is None else (begin, *ids)

    @property
    def tokens(self) -> int:
        """Training tokens seen so far, in supervised steps."""
        return min(self.step, self.supervised_steps) * self.job.variant.step_tokens

    def _train_one(self) -> None:
        if self.step < self.supervised_steps:
            super()._train_one()
            return
        begin = time.perf_counter()
        if self.step == self.supervised_steps:
            self._told.append(self.evaluate_passes())
            if self.rlvr.kl:
                self._reference = self._copy_model()
        elapsed_before = time.perf_counter() - begin
        self._told.append(self._reinforce())
        self.step += 1
        self.train_wall_s += time.perf_counter() - begin - elapsed_before
        done, total = self.step - self.supervised_steps, self.rlvr.steps
        if done * (EVALS_ON_THE_WAY + 1) // total > (done - 1) * (EVALS_ON_THE_WAY + 1) // total:
            self._told.append(self.evaluate_passes())

    def _step_events(self) -> list[Event]:
        if self.step <= self.supervised_steps:
            return super()._step_events()
        told, self._told = self._told, []
        return told

    def _lr_factor(self, step: int) -> float:
        """Of supervised steps the schedule's, which ends with them; then one that stays."""
        if step < self.supervised_steps:
            return super()._lr_factor(step)
        return self.rlvr.learning_rate_share

    # Sampling

    def sample_tasks(self, tasks: Sequence[Task], num_samples: int, seed: int) -> Judged:
        """Answers of the model as it is to each task, and what their verifiers say."""
        fleet = self._open_fleet()
        groups = [
            Group(
                prompt_ids=self._prompt_ids(task.prompt),
                num_samples=num_samples,
                max_tokens=self.rlvr.max_new_tokens,
                seed=seed * 65_536 + number,
            )
            for number, task in enumerate(tasks)
        ]
        samples = fleet.sample(groups)
        verdicts = [
            build_verifier(task.verifier).score(task.prompt, [sample.text for sample in members])
            for task, members in zip(tasks, samples, strict=True)
        ]
        return Judged(
            groups,
            samples,
            [[v.reward if self.rlvr.graded else float(v.passed) for v in members] for members in verdicts],
            [sum(verdict.passed for verdict in members) for members in verdicts],
        )

    def _open_fleet(self) -> Fleet:
        """The fleet with the weights as they are."""
        if self._fleet is None:
            policy = Policy(
                spec=self.job.variant.model.spec,
                text_files=dict(Text.of(self.dataset).files),
                eos=self.dataset.token_ids.eos,
                bos=self.dataset.token_ids.bos,
            )
            self._fleet = self.make_fleet(policy, self.rlvr, self.plan)
        self._fleet.update(self.arrays())
        return self._fleet

    def arrays(self) -> dict[str, FloatArray]:
        """The weights as they are used."""
        state = {**self.model.state_dict(), "embedding.weight": self.model.table_VE}
        return {name: tensor.detach().float().cpu().numpy() for name, tensor in state.items()}

    def evaluate_passes(self) -> PassEvent:
        """How often answers to held-out prompts pass now."""
        begin = time.perf_counter()
        tasks = self._held_out[: self.rlvr.eval_prompts]
        count = self.rlvr.eval_samples
        # The same draws each time, so that two moments differ by their weights alone.
        judged = self.sample_tasks(tasks, count, seed=2**40 + self.job.seed)
        one, many = (estimate_pass_at_k(judged.passed, count, k) for k in (1, count))
        return PassEvent(
            variant=self.job.variant.name,
            seed=self.job.seed,
            step=self.step,
            reinforce_step=self.step - self.supervised_steps,
            train_wall_s=self.train_wall_s,
            prompts=len(tasks),
            samples=count,
            pass_at_1=one.value,
            pass_at_1_low=one.low,
            pass_at_1_high=one.high,
            pass_at_k=many.value,
            pass_at_k_low=many.low,
            pass_at_k_high=many.high,
            eval_wall_s=time.perf_counter() - begin,
        )

    # Learning

    def _reinforce(self) -> ReinforceEvent:
        rlvr, step = self.rlvr, self.step - self.supervised_steps
        begin = time.perf_counter()
        rng = np.random.default_rng((self.job.seed, 1, step))
        train = self._reinforced
        chosen = [train[i] for i in rng.choice(len(train), min(rlvr.prompts_per_step, len(train)), replace=False)]
        judged = self.sample_tasks(chosen, rlvr.samples_per_prompt, seed=self.job.seed * 1_000_003 + step)
        rollout_s = time.perf_counter() - begin
        advantages = group_advantages(judged.rewards, divide_by_std=rlvr.divide_by_std)
        batch = build_batch(judged.groups, judged.samples, advantages)
        learned = _Learned() if batch is None else self._learn(batch)
        samples = [sample for members in judged.samples for sample in members]
        length = sum(len(sample.tokens) for sample in samples) / len(samples)
        cut = sum(not sample.ended for sample in samples) / len(samples)
        reward = sum(map(sum, judged.rewards)) / len(samples)
        differing = sum(any(members) for members in advantages)
        event = ReinforceEvent(
            variant=self.job.variant.name,
            seed=self.job.seed,
            step=step + 1,
            num_steps=rlvr.steps,
            train_wall_s=self.train_wall_s + time.perf_counter() - begin,
            reward=reward,
            passed=sum(judged.passed) / len(samples),
            differing_groups=differing / len(judged.groups),
            length=length,
            cut=cut,
            entropy=learned.entropy if batch is not None else None,
            mismatch=learned.mismatch if batch is not None else None,
            mismatch_max=learned.mismatch_max if batch is not None else None,
            kl=learned.kl,
            clipped=learned.clipped,
            grad_norm=learned.grad_norm,
            rollout_s=rollout_s,
            update_s=time.perf_counter() - begin - rollout_s,
            rollout_tokens=sum(len(sample.tokens) for sample in samples),
        )
        entropy = learned.entropy if batch is not None else self._gates.first_entropy
        self._gates.check(self.step, StepFigures(reward, entropy, length, cut, differing))
        return event

    def _learn(self, batch: Batch) -> _Learned:
        """One or more updates on a batch of answers, which comes in parts that fit memory."""
        rlvr, model = self.rlvr, self.model
        parts = [part.to(self.plan.device) for part in _split(batch, rlvr.micro_batch_size)]
        count = int(batch.answer_BT.sum())
        weights = Weights(rlvr.clip_low, rlvr.clip_high, rlvr.kl, rlvr.importance_limit)
        references = [self._reference_logprobs(part) for part in parts]
        olds: list[Tensor] = []
        learned = _Learned()
        for update in range(rlvr.updates_per_batch):
            losses: list[PolicyLoss] = []
            for number, part in enumerate(parts):
                logprobs_N, entropy_N = answer_logprobs(model, part)
                if not update:
                    olds.append(logprobs_N.detach())
                    learned.add(olds[number] - part.sampled_BT[part.answer_BT], entropy_N, count)
                advantages_N = part.advantages_B[:, None].expand_as(part.ids_BT)[part.answer_BT]
                sampled_N = part.sampled_BT[part.answer_BT]
                losses.append(
                    policy_loss(logprobs_N, olds[number], sampled_N, advantages_N, weights, references[number], count)
                )
                self._take_step.scaler.scale(losses[-1].loss).backward()
            norm = self._take_step.apply(self._lr_factor(self.step))
            loss = sum(float(part.loss.detach()) for part in losses)
            check_step(self.step, loss, norm, first_loss=0.0, vocab_size=self.job.variant.model.vocab_size)
            learned.grad_norm = max(learned.grad_norm, norm)
            learned.kl = sum(part.kl for part in losses)
            learned.clipped = sum(part.clipped for part in losses)
        return learned

    @torch.no_grad()
    def _reference_logprobs(self, part: Batch) -> Tensor | None:
        return None if self._reference is None else answer_logprobs(self._reference, part)[0]

    def _copy_model(self) -> Decoder:
        copy = Decoder(self.job.variant.model.spec, self.plan.attention)
        copy.normalize_embedding = self.model.normalize_embedding
        copy.load_state_dict(self.model.state_dict())
        return copy.to(self.plan.device).eval().requires_grad_(False)

    # Checkpoints

    def _extra_state(self) -> dict[str, object]:
        return {"gates": to_mapping(self._gates)}

    def _extra_tensors(self) -> dict[str, Tensor]:
        if self._reference is None:
            return {}
        return {f"{_REFERENCE}{name}": tensor for name, tensor in self._reference.state_dict().items()}

    def _load_extra(self, state: Unchecked, tensors: dict[str, Tensor]) -> None:
        self._gates = read_mapping(RewardGates, state["gates"])
        found = {n.removeprefix(_REFERENCE): t for n, t in tensors.items() if n.startswith(_REFERENCE)}
        if found:
            self._reference = self._copy_model()
            self._reference.load_state_dict(found)

    def close(self) -> None:
        """Give the fleet back."""
        if self._fleet is not None:
            self._fleet.close()
            self._fleet = None


class _Learned:
    """What a step's updates showed, means over tokens."""

    def __init__(self) -> None:
        self.entropy = self.mismatch = self.mismatch_max = self.kl = self.clipped = self.grad_norm = 0.0

    def add(self, differences_N: Tensor, entropy_N: Tensor, count: int) -> None:
        """Take a part's differences between training's and the sampler's log probabilities, and its entropies."""
        self.entropy += float(entropy_N.sum()) / count
        self.mismatch += float(differences_N.abs().sum()) / count
        self.mismatch_max = max(self.mismatch_max, float(differences_N.abs().max()))


def _split(batch: Batch, size: int) -> list[Batch]:
    """Rows in parts of `size`, each as long as its longest row."""
    order = batch.answer_BT.int().argmax(1) + batch.answer_BT.sum(1)
    parts = []
    for rows in order.argsort(stable=True).split(size):
        length = int(order[rows].max()) + 1
        parts.append(
            Batch(
                batch.ids_BT[rows, :length],
                batch.answer_BT[rows, :length],
                batch.sampled_BT[rows, :length],
                batch.advantages_B[rows],
            )
        )
    return parts


def build_trainer(
    job: TrainJob, plan: KernelPlan, teacher: Teacher | None = None, checkpoint: Path | None = None
) -> Trainer:
    """The trainer that a job's recipe asks for, new or gone on with from a checkpoint."""
    kind = Trainer if job.variant.rlvr is None else ReinforceTrainer
    return kind(job, plan, teacher) if checkpoint is None else kind.resume(job, plan, checkpoint, teacher)
