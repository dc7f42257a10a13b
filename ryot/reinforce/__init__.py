"""Reinforcement with verifiable rewards: the model's own answers, judged by programs, are what it learns from.

tasks.py procedural.py   prompts and how their answers are checked
live_bundle.py           an exported graph whose weights are replaced while it is used
rollouts.py              answers sampled from it as one continuous batch
grpo.py gates.py         what is learned from them, and when that is stopped
pass_at_k.py             how good the model is, with intervals
trainer.py               one training: supervised steps first, then these
"""
