"""Tasks and actors on one node alone, which Ray never begins anew by itself: whoever asked decides what comes then.

A restarted actor would answer from a fresh constructor as if nothing had happened.
"""

from __future__ import annotations

from typing import Any


def task_on(node_id: str, function: Any, **options: Any) -> Any:
    """`function` as a remote task there; `options` are those of `ray.remote`."""
    return _bound(node_id, function, max_retries=0, **options)


def actor_on(node_id: str, cls: Any, **options: Any) -> Any:
    """`cls` as an actor there."""
    return _bound(node_id, cls, max_restarts=0, max_task_retries=0, **options)


def _bound(node_id: str, what: Any, **options: Any) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options |= {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}
    return ray.remote(**options)(what)
