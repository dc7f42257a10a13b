"""The scheduler with a real Ray: what is trained, what is lost, what counts."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

from ryot.cluster.options import DriverOptions
from ryot.cluster.runtime import EmbeddedCluster
from ryot.config import KernelPlan, replace
from ryot.errors import ClusterError, Interrupted, TrainingError
from ryot.events import Event, GateEvent
from ryot.run.training import TrainResult
from ryot.train.checkpoint import checkpoint_digest
from ryot.train.dataset import Dataset
from tests.cluster.conftest import SHORT, Recorder, learned, learned_alone, planned, records, train, workers_of


@pytest.fixture(scope="module")
def expected(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the standard training of this module learns when nothing disturbs it."""
    [digest] = learned_alone([planned(dataset)], tmp_path_factory.mktemp("alone")).values()
    return digest


class Ended(NamedTuple):
    """A run whose one training has ended; read-only."""

    folder: Path
    result: TrainResult
    events: list[Event]

    def copy(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.folder, folder))


@pytest.fixture(scope="module")
def ended(cluster: EmbeddedCluster, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder, seen = tmp_path_factory.mktemp("ended") / "run", Recorder()
    [result] = train(folder, [planned(dataset)], cluster, options=replace(SHORT, keep_checkpoints=3), emit=seen)
    return Ended(folder, result, seen.events)


def test_a_training_in_chunks_learns_what_one_in_a_piece_learns(ended: Ended, expected: str) -> None:
    result = ended.result
    assert learned(result.checkpoint) == expected
    assert (result.step, result.attempts, result.cached, result.error) == (60, 1, False, None)
    assert len(records(ended.folder, "checkpoint")) > 1
    assert result.sha256 == checkpoint_digest(result.checkpoint)
    evals = [e for e in ended.events if e.kind == "eval" and e.split == "val"]
    assert result.metrics.val_loss == evals[-1].loss
    assert result.metrics.initial_val_loss == evals[0].loss
    assert result.metrics.tokens == 60 * 4 * 32
    assert result.metrics.test_loss == [e for e in ended.events if e.kind == "eval"][-1].loss


def test_a_killed_worker_costs_no_accepted_step_and_changes_no_weight(
    cluster: EmbeddedCluster, dataset: Dataset, expected: str, tmp_path: Path
) -> None:
    def kill() -> None:
        [worker] = workers_of(cluster.folder)
        os.kill(worker, signal.SIGKILL)

    seen = Recorder("checkpoint", kill, after=2)
    [result] = train(tmp_path, [planned(dataset)], cluster, emit=seen)
    assert learned(result.checkpoint) == expected
    assert result.attempts == 2
    steps = [e.step for e in seen.events if e.kind == "checkpoint"]
    assert steps == sorted(set(steps))
    [lost] = seen.details("lost")
    assert lost.startswith("its worker process has died")
    assert f"again from step {steps[1]}" in lost
    # Of two attempts only what counts is left on disk, and what their workers said.
    logs = sorted((tmp_path / "variants/optimized/seed-0").glob("attempt-*/worker.log"))
    assert "resuming from step 0 of 60" in logs[0].read_text()
    assert f"resuming from step {steps[1]} of 60" in logs[1].read_text()
    kept = sorted(p.name for p in (tmp_path / "variants/optimized/seed-0").glob("attempt-*/step-*"))
    assert kept == [f"step-{step:08d}" for step in steps[-SHORT.keep_checkpoints :]]


def test_a_worker_given_up_that_goes_on_writing_spoils_nothing(
    cluster: EmbeddedCluster, dataset: Dataset, expected: str, tmp_path: Path
) -> None:
    stopped: list[int] = []

    def stop() -> None:
        stopped.extend(workers_of(cluster.folder))
        os.kill(stopped[0], signal.SIGSTOP)

    def let_go_on() -> None:
        os.kill(stopped[0], signal.SIGCONT)

    class Both(Recorder):
        def __call__(self, event) -> None:
            super().__call__(event)
            if event.kind == "stage" and event.status == "lost":
                let_go_on()

    seen = Both("checkpoint", stop)
    # A worker that hangs is lost once its chunk is overdue.
    options = replace(SHORT, chunk_timeout_s=3.0)
    [result] = train(tmp_path, [planned(dataset)], cluster, options=options, emit=seen)
    assert learned(result.checkpoint) == expected
    [lost] = seen.details("lost")
    assert lost.startswith("no report within 3 s on ")
    first = [r for r in records(tmp_path, "checkpoint") if r["attempt"] == 1]
    assert len(first) == 1
    assert [r["attempt"] for r in records(tmp_path, "attempt")] == [1, 2]


def test_more_trainings_than_cores_all_end_longest_first(
    cluster: EmbeddedCluster, dataset: Dataset, expected: str, tmp_path: Path
) -> None:
    jobs = [
        planned(dataset, steps=12, seed=1),
        planned(dataset, steps=12, seed=2),
        planned(dataset, "baseline", steps=12),
    ]
    jobs.append(planned(dataset))
    results = train(tmp_path, jobs, cluster)
    assert [(r.variant, r.seed, r.step) for r in results] == [
        ("optimized", 1, 12),
        ("optimized", 2, 12),
        ("baseline", 0, 12),
        ("optimized", 0, 60),
    ]
    # A worker that has trained others before learns the same.
    assert learned(results[3].checkpoint) == expected
    assert records(tmp_path, "attempt")[0]["key"] == "optimized/seed-0"
    assert records(tmp_path, "attempt")[1]["key"] == "baseline/seed-0"


def test_a_breached_gate_fails_its_variant_and_no_other(
    cluster: EmbeddedCluster, dataset: Dataset, tmp_path: Path
) -> None:
    wild = planned(dataset, "baseline", steps=60, learning_rate=1e6, max_grad_norm=1e9)
    seen = Recorder()
    failed, fine = train(tmp_path, [wild, planned(dataset, steps=12)], cluster, emit=seen)
    assert isinstance(failed.error, TrainingError)
    assert str(failed.error).startswith("gate ")
    [told] = [e for e in seen.events if isinstance(e, GateEvent)]
    assert (told.variant, told.passed) == ("baseline", False) and told.gate in str(failed.error)
    assert (fine.error, fine.step) == (None, 12)
    again, _ = train(tmp_path, [wild, planned(dataset, steps=12)], cluster)
    assert again.cached
    assert str(again.error) == str(failed.error)


def test_an_ended_training_is_not_done_again_and_a_changed_one_is(
    cluster: EmbeddedCluster, ended: Ended, dataset: Dataset, tmp_path: Path
) -> None:
    folder = ended.copy(tmp_path / "run")
    [again] = train(folder, [planned(dataset)], cluster)
    assert again.cached and again.checkpoint is not None and ended.result.checkpoint is not None
    assert again.checkpoint.relative_to(folder) == ended.result.checkpoint.relative_to(ended.folder)
    assert again.metrics == ended.result.metrics
    assert records(folder, "attempt") == records(ended.folder, "attempt")
    inputs = [planned(dataset), planned(dataset, steps=16), planned(dataset, workers=2)]
    assert len({p.digest for p in inputs}) == 3


def test_damaged_checkpoints_are_named_and_the_newest_whole_one_is_used(
    cluster: EmbeddedCluster, ended: Ended, dataset: Dataset, expected: str, tmp_path: Path
) -> None:
    folder = ended.copy(tmp_path / "run")
    whole, missing, changed = records(folder, "checkpoint")[-3:]
    weights = folder / changed["path"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    shutil.rmtree(folder / missing["path"])
    seen = Recorder()
    [result] = train(folder, [planned(dataset)], cluster, emit=seen)
    assert learned(result.checkpoint) == expected
    assert seen.details("rejected") == [
        f"checkpoint {changed['path']} has changed since it was accepted; resuming from step {missing['step']}",
        f"checkpoint {missing['path']} is missing; resuming from step {whole['step']}",
    ]
    assert seen.details("begin")[0].startswith(f"step {whole['step']} on ")


def test_results_are_handed_over_in_a_thread_while_others_train_and_what_that_raises_comes_out_at_the_end(
    cluster: EmbeddedCluster, ended: Ended, dataset: Dataset, tmp_path: Path
) -> None:
    handed: list[int] = []
    other_ended = threading.Event()

    def on_done(result: TrainResult) -> None:
        handed.append(result.seed)
        assert threading.current_thread().name == "on-done"
        # The scheduler goes on: the other training can end while the first one's callback still runs.
        assert other_ended.wait(timeout=60)
        if len(handed) == 2:
            raise ClusterError("no export today")

    def watch(event: Event) -> None:
        if event.kind == "stage" and event.status == "end":
            other_ended.set()

    folder = ended.copy(tmp_path / "run")
    jobs = [planned(dataset), planned(dataset, steps=4, seed=1)]
    with pytest.raises(ClusterError, match="no export today"):
        train(folder, jobs, cluster, emit=watch, on_done=on_done)
    assert handed == [0, 1]
    assert len(records(folder, "done")) == 2


def test_a_run_that_fails_waits_for_the_callback_in_flight_and_begins_no_other(
    cluster: EmbeddedCluster, ended: Ended, dataset: Dataset, tmp_path: Path
) -> None:
    failed, called = threading.Event(), []

    def on_done(result: TrainResult) -> None:
        assert failed.wait(timeout=60)
        called.append(result.seed)

    def fail(event: Event) -> None:
        if event.kind == "stage" and event.status == "end":
            failed.set()
            raise ClusterError("no event today")

    jobs = [planned(dataset), planned(dataset, steps=4, seed=1)]
    with pytest.raises(ClusterError, match="no event today"):
        train(ended.copy(tmp_path / "run"), jobs, cluster, emit=fail, on_done=on_done)
    assert called == [0]


def test_a_signal_that_comes_during_the_last_callback_stops_the_run(
    cluster: EmbeddedCluster, ended: Ended, dataset: Dataset, tmp_path: Path
) -> None:
    called: list[str] = []

    def on_done(result: TrainResult) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        called.append(result.variant)

    folder = ended.copy(tmp_path / "run")
    with pytest.raises(Interrupted, match="stopped by a signal"):
        train(folder, [planned(dataset)], cluster, on_done=on_done)
    # The callback itself is let end: it is the chunk in flight.
    assert called == ["optimized"]
    [result] = train(folder, [planned(dataset)], cluster)
    assert result.cached


def test_a_second_signal_during_the_last_callback_stops_at_once(
    cluster: EmbeddedCluster, ended: Ended, dataset: Dataset, tmp_path: Path
) -> None:
    let_go = threading.Event()

    def on_done(result: TrainResult) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        let_go.wait(timeout=60)

    try:
        with pytest.raises(Interrupted, match="stopped at once"):
            train(ended.copy(tmp_path / "run"), [planned(dataset)], cluster, on_done=on_done)
        assert not let_go.is_set()
    finally:
        let_go.set()


def test_a_gpu_that_no_node_has_is_refused_before_anything_waits(
    cluster: EmbeddedCluster, dataset: Dataset, tmp_path: Path
) -> None:
    if any(n.gpus for n in cluster.nodes()):
        pytest.skip("this machine has a GPU")
    job = replace(planned(dataset), kernels=KernelPlan(device="cuda"))
    with pytest.raises(ClusterError, match=r"training needs 1 CPUs and 1 GPU on one node.*the most GPUs 0"):
        train(tmp_path, [job], cluster)


def test_a_run_folder_that_vanishes_ends_the_run_with_what_to_do(
    cluster: EmbeddedCluster, dataset: Dataset, tmp_path: Path
) -> None:
    def vanish() -> None:
        # What was a folder is a file now: not even root can write a checkpoint there.
        shutil.rmtree(tmp_path / "variants")
        (tmp_path / "variants").write_text("")

    with pytest.raises(ClusterError) as caught:
        train(tmp_path, [planned(dataset)], cluster, emit=Recorder("checkpoint", vanish))
    assert "variants" in str(caught.value) and "resume the run" in str(caught.value.hint)


def test_threads_that_no_node_has_are_refused_before_anything_waits(
    cluster: EmbeddedCluster, dataset: Dataset, tmp_path: Path
) -> None:
    job = replace(planned(dataset), kernels=KernelPlan(threads=512))
    with pytest.raises(ClusterError, match="training needs 512 CPUs on one node, but the largest of 1 nodes has"):
        train(tmp_path, [job], cluster)


def test_a_worker_that_dies_again_and_again_fails_its_training_with_the_reason(
    cluster: EmbeddedCluster, dataset: Dataset, tmp_path: Path
) -> None:
    class Killer(Recorder):
        def __call__(self, event) -> None:
            super().__call__(event)
            if event.kind == "stage" and event.status == "begin":
                for worker in workers_of(cluster.folder):
                    os.kill(worker, signal.SIGKILL)

    options = DriverOptions(chunk_s=60, backoff_s=0.05, max_failures=1)
    [result] = train(tmp_path, [planned(dataset, steps=4000)], cluster, options=options, emit=Killer())
    assert "2 workers failed in a row" in str(result.error)
    assert result.checkpoint is None
    # That is no fault of the recipe: a resumed run tries again.
    assert records(tmp_path, "failed")[0]["final"] is False


def test_a_group_that_loses_a_rank_starts_again_as_one_and_learns_the_same(
    cluster: EmbeddedCluster, dataset: Dataset, tmp_path: Path
) -> None:
    def kill_one() -> None:
        ranks = workers_of(cluster.folder)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)

    [whole] = train(tmp_path / "whole", [planned(dataset, steps=30, workers=2)], cluster)
    seen = Recorder("checkpoint", kill_one, after=2)
    [broken] = train(tmp_path / "broken", [planned(dataset, steps=30, workers=2)], cluster, emit=seen)
    assert "2 ranks" in seen.details("begin")[0]
    assert (whole.attempts, broken.attempts) == (1, 2)
    assert learned(broken.checkpoint) == learned(whole.checkpoint)


def test_a_time_limit_stops_as_a_signal_does(cluster: EmbeddedCluster, dataset: Dataset, tmp_path: Path) -> None:
    options = replace(SHORT, max_hours=1e-9)
    with pytest.raises(Interrupted, match="the time limit was reached"):
        train(tmp_path, [planned(dataset)], cluster, options=options)
