"""Batches and the server on a real local Ray."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ryot.cluster.batches import run_cluster_batch
from ryot.cluster.options import ClusterOptions
from ryot.cluster.runtime import open_cluster
from ryot.serve.batch import run_batch
from ryot.serve.model import ModelOptions, ServedModel
from ryot.serve.server import ServerOptions
from tests.cluster.conftest import processes_of
from tests.edge.tiny_bundle import write_bundle
from tests.serve.test_batch import read

pytestmark = pytest.mark.slow
OPTIONS = ModelOptions(rows=4, max_waiting=1000)
#: Shared memory that Ray Data's blocks need a little of.
CLUSTER = ClusterOptions(num_cpus=2, malloc_tunables="")


def test_a_batch_on_a_cluster_has_the_answers_of_one_machine(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", context=256, seed=1)
    requests, alone, together = (tmp_path / name for name in ("requests.jsonl", "alone.jsonl", "together.jsonl"))
    common = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    asked = [common | {"prompt": f"number {number}"} for number in range(20)]
    lines = [
        json.dumps({"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body})
        for number, body in enumerate(asked)
    ]
    lines.insert(3, "no json")
    requests.write_text("\n".join(lines) + "\n")
    run_batch(ServedModel(bundle, OPTIONS), requests, alone, lambda progress: None)
    # What a run before left is not asked again.
    kept = alone.read_text().splitlines(keepends=True)[:4]
    together.write_text("".join(kept))
    progress, bad = run_cluster_batch(bundle, OPTIONS, requests, together, lambda progress: None, CLUSTER)
    assert (progress.total, progress.before, progress.done, progress.failed) == (20, 4, 16, 0)
    assert [line.number for line in bad] == [4]
    assert together.read_text().startswith("".join(kept))

    def texts(path: Path) -> dict[str, str]:
        return {answer["custom_id"]: answer["response"]["body"]["choices"][0]["text"] for answer in read(path)}

    assert texts(together) == texts(alone) and len(read(together)) == 20


def test_replicas_answer_and_prompts_that_begin_alike_find_their_cache(tmp_path: Path) -> None:
    from ray import serve

    from ryot.cluster.replicas import APP_NAME, ReplicaOptions, build_application, prefix_key

    bundle = write_bundle(tmp_path / "bundle", context=1024, seed=1)
    asked = ReplicaOptions(
        bundles=(bundle,),
        model=OPTIONS,
        api_keys=("secret", "other"),
        share_prefixes=True,
        min_replicas=2,
        max_replicas=2,
    )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with open_cluster(CLUSTER, log_dir=tmp_path / "logs") as cluster:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_application(asked), name=APP_NAME, route_prefix="/")

        def connect(
            body: dict[str, object] | None, path: str = "/v1/completions", key: str = "secret"
        ) -> http.client.HTTPResponse:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
            connection.request("GET" if body is None else "POST", path, json.dumps(body), headers)
            return connection.getresponse()

        def post(body: dict[str, object], key: str = "secret", path: str = "/v1/completions") -> tuple[int, bytes]:
            answer = connect(body, path, key)
            return answer.status, answer.read()

        def get(path: str, key: str = "secret") -> tuple[int, bytes]:
            answer = connect(None, path, key)
            return answer.status, answer.read()

        prompt = "a text that many prompts begin with, " * 3
        body: dict[str, object] = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        assert post(body, "wrong")[0] == 401
        found = [json.loads(post(body)[1]) for _ in range(4)]
        assert len({json.dumps(one["choices"]) for one in found}) == 1
        cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in found]
        assert cached[0] == 0 and all(cached[1:])
        # As `--share-prefixes` allows.
        assert json.loads(post(body, "other")[1])["usage"]["prompt_tokens_details"]["cached_tokens"]
        status, text = post(body | {"stream": True})
        assert status == 200 and text.startswith(b"data: ") and text.endswith(b"data: [DONE]\n\n")
        assert post({"prompt": 5})[0] == 400
        assert json.loads(get("/metrics", "wrong")[1])["error"]["code"] == "invalid_api_key"
        families = {family.name: family for family in text_string_to_metric_families(get("/metrics")[1].decode())}
        ended = families["vllm:request_success"].samples
        # Each replica's own figures: together they have seen the six requests that were answered.
        assert len({sample.labels["replica"] for sample in ended}) == 2
        assert sum(sample.value for sample in ended) == 6
        assert families["vllm:request_prompt_tokens"].type == "histogram"
        reload = json.loads(post({}, path="/admin/reload")[1])
        assert "deploy the bundles again" in reload["error"]["message"]

        # Another bundle in the place of the first, replica by replica, while requests keep coming.
        answers: list[tuple[int, bytes]] = []
        swapped, stop = threading.Event(), threading.Event()

        def ask_on() -> None:
            while not stop.is_set():
                answers.append(post(body | {"max_tokens": 30}))
                if answers[-1][0] != 200 or json.loads(answers[-1][1])["model"] == "tiny-2":
                    swapped.set()

        asking = [threading.Thread(target=ask_on) for _ in range(3)]
        for thread in asking:
            thread.start()
        fresh = write_bundle(tmp_path / "fresh", context=1024, seed=2)
        serve.run(build_application(replace(asked, bundles=(fresh,))), name=APP_NAME, route_prefix="/")
        assert swapped.wait(60)
        stop.set()
        for thread in asking:
            thread.join()
        assert {status for status, _ in answers} == {200}, [said for status, said in answers if status != 200][:3]
        assert {json.loads(said)["model"] for _, said in answers} == {"tiny-1", "tiny-2"}
        assert json.loads(post(body)[1])["model"] == "tiny-2"

        # Replicas that die are told of as everything else is.
        long = connect(body | {"stream": True, "max_tokens": 900, "logprobs": 20})
        assert long.read(6) == b"data: "
        replicas = [one for one in processes_of(cluster.folder) if "ServeReplica:ryot:model" in " ".join(one.cmdline())]
        assert replicas
        for process in replicas:
            process.kill()
        last = long.read().rstrip().rpartition(b"data: ")[2]
        assert json.loads(last)["error"]["code"] == "unavailable", last
        serve.shutdown()
    assert prefix_key(b"{") == prefix_key(b"[1]") == ""
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    longer = [*talk, {"role": "assistant", "content": "a"}, {"role": "user", "content": "more"}]
    assert prefix_key(json.dumps({"messages": talk}).encode()) == prefix_key(json.dumps({"messages": longer}).encode())


def test_what_serve_is_told_reaches_the_replicas(tmp_path: Path) -> None:
    from ryot.cluster.replicas import ReplicaOptions, build_application

    told = ServerOptions(
        api_keys=("secret",), share_prefixes=True, max_body_bytes=7, timeout_s=8.0, drain_s=9, host="0.0.0.0"
    )
    asked = ReplicaOptions.of((tmp_path,), OPTIONS, told, max_replicas=2)
    same = ("api_keys", "share_prefixes", "max_body_bytes", "timeout_s", "drain_s")
    assert [getattr(asked, name) for name in same] == [getattr(told, name) for name in same]
    (replicas,) = build_application(asked)._bound_deployment.init_args[:1]
    config = replicas._bound_deployment._deployment_config
    assert config.graceful_shutdown_timeout_s == 9
    scaling = config.autoscaling_config
    # One more where each has as many requests as rows.
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 2)
    assert scaling.target_ongoing_requests == OPTIONS.rows < config.max_ongoing_requests
    assert replicas._bound_deployment.ray_actor_options["num_cpus"] == OPTIONS.threads


def test_a_stream_that_breaks_in_a_replica_ends() -> None:
    from ryot.cluster.replicas import Replica, ReplicaOptions

    async def breaks(scope: object, receive: object, send: Callable[[dict[str, object]], Awaitable[None]]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        raise ZeroDivisionError

    async def read() -> list[object]:
        replica = Replica(ReplicaOptions(bundles=(), model=ModelOptions()))
        replica._app = breaks
        found: list[object] = []
        with pytest.raises(ZeroDivisionError):
            async for part in replica.answer("GET", "/", [], b"", key=""):
                found.append(part)
        return found

    async def read_in_time() -> list[object]:
        task = asyncio.create_task(read())
        done, _ = await asyncio.wait({task}, timeout=5)
        task.cancel()
        assert done, "it waits for ever"
        return task.result()

    assert asyncio.run(read_in_time())[:2] == [(200, []), b"a"]
