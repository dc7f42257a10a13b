"""The load of `serving.py`: a process of its own that sends requests over HTTP and notes when each token came.

    python benchmarks/serving_load.py < JOB.json > FOUND.json

A job has `port`, `path`, `requests`, and either `at_once`, how many are under way together, or `arrivals_s`, when
each is sent. A request has `body` and perhaps `cancel_after`, tokens after which its connection is cut. Times in an
answer are seconds since the job began. Only the standard library: what the load costs is not the server's.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any


async def ask(job: dict[str, Any], request: dict[str, Any], began_s: float) -> dict[str, Any]:
    """Send one request; the times of its events, its tokens, and what went wrong."""
    body = json.dumps(request["body"]).encode()
    head = f"POST {request.get('path', job['path'])} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    cancel_after = request.get("cancel_after")
    found: dict[str, Any] = {"sent_s": time.perf_counter() - began_s, "events_s": [], "usage": None, "status": 0}
    reader, writer = await asyncio.open_connection("127.0.0.1", job["port"], limit=1 << 22)
    try:
        writer.write(head.encode() + body)
        status = await reader.readline()
        found["status"] = int(status.split()[1])
        while (await reader.readline()).strip():
            pass
        if found["status"] != 200 or not request["body"].get("stream"):
            data = await reader.read()
            found["usage"] = _find_usage(data)
            found["events_s"].append(time.perf_counter() - began_s)
            found["error"] = None if found["status"] == 200 else data[-300:].decode("utf-8", "replace")
        while request["body"].get("stream") and (line := await reader.readline()):
            if not line.startswith(b"data: "):
                continue
            if b'"usage":{' in line or b'"usage": {' in line:
                found["usage"] = json.loads(line[6:])["usage"] or found["usage"]
            if line.startswith(b"data: [DONE]"):
                found["done"] = True
                break
            found["events_s"].append(time.perf_counter() - began_s)
            if b'"error":' in line:  # with the colon: a piece of text may be "error"
                found["error"] = line[:300].decode("utf-8", "replace")
            if cancel_after is not None and len(found["events_s"]) >= cancel_after:
                found["cancelled"] = True
                break
    except (OSError, ValueError, IndexError) as error:
        found["error"] = repr(error)
    finally:
        writer.transport.abort()
    found["ended_s"] = time.perf_counter() - began_s
    if not job.get("keep_events"):
        events = found["events_s"]
        found["events_s"] = [events[0], events[-1]] if events else []
    return found


def _find_usage(data: bytes) -> dict[str, int] | None:
    at = data.find(b"{")
    try:
        return json.loads(data[at : data.rfind(b"}") + 1]).get("usage")
    except ValueError:
        return None


async def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """All requests of a job, in their order."""
    began_s = time.perf_counter()
    places = asyncio.Semaphore(job.get("at_once") or len(job["requests"]))
    tasks = []

    async def send(request: dict[str, Any]) -> dict[str, Any]:
        try:
            return await ask(job, request, began_s)
        finally:
            places.release()

    for number, request in enumerate(job["requests"]):
        if arrivals := job.get("arrivals_s"):
            await asyncio.sleep(max(0.0, arrivals[number] - (time.perf_counter() - began_s)))
        await places.acquire()
        tasks.append(asyncio.create_task(send(request)))
    return list(await asyncio.gather(*tasks))


def main() -> None:
    job = json.load(sys.stdin)
    if job.get("core") is not None:
        os.sched_setaffinity(0, {job["core"]})
    json.dump(asyncio.run(run(job)), sys.stdout)


if __name__ == "__main__":
    main()
