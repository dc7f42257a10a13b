"""One engine with one model in a process of its own, pinned to cores; `peer_process.py` starts it and gives turns.

    python benchmarks/peer_worker.py CORE,CORE   (a JSON request per line on stdin, a JSON answer per line on stdout)

    {"do": "load", "engine": …, …}             load; the other keys are the arguments of the engine's class
    {"do": "turn", "prompts": […], "steps": N} answer the prompts (one per row), then decode N tokens; times and tokens
    {"do": "cold", "prompt": […], "steps": N}  load is timed from the process's start to the first token; then N tokens
    {"do": "bandwidth", "sizes": […]}          bytes per second of reading arrays of these sizes (engine `none`)

A turn of every engine hands each token to Python, as a program that streams has to. Nothing heavy is imported before
it is known which engine this is: the memory and the start of the others would be counted to it.
"""

import json
import os
import sys
import time
from typing import Any

#: Set by the parent: when it started this process, on the clock that both share.
SPAWNED_VARIABLE = "EDGE_VS_PEERS_SPAWNED_AT_S"


class Ryot:
    """A bundle in one of our engines, with a cache that has room for `reserve` tokens from the start."""

    def __init__(self, bundle: str, via: str, batch_size: int = 1, threads: int = 1, reserve: int = 0):
        from ryot.edge.bundle import load_bundle
        from ryot.edge.engines import open_engine

        self._decoder = open_engine(
            load_bundle(bundle, verify=False), engine=via, batch_size=batch_size, threads=threads
        )
        self._decoder.reserve(reserve)
        self._step = self._decoder.step
        self.detail = self._decoder.name

    def prefill(self, prompts: list[list[int]]) -> int:
        self._decoder.prefill(prompts)
        return int(self._decoder.next_token[0])

    def step(self) -> int:
        self._step()
        return int(self._decoder.next_token[0])


class Torch:
    """The decoder in torch; both ways compute the head for the last position only, as generation does."""

    def __init__(self, checkpoint: str, cached: bool):
        from pathlib import Path

        import torch
        import torch.nn.functional as F

        from ryot.train.checkpoint import load_model

        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        self._torch, self._linear = torch, F.linear
        self._model = load_model(Path(checkpoint))
        self._cached = cached
        self.detail = f"torch {torch.__version__}"

    def prefill(self, prompts: list[list[int]]) -> int:
        self._ids = self._torch.tensor(prompts)
        self._past = None
        return self._next(self._ids)

    def step(self) -> int:
        if self._cached:
            return self._next(self._token)
        self._ids = self._torch.cat((self._ids, self._token), dim=1)
        return self._next(self._ids)

    def _next(self, ids: Any) -> int:
        x, past = self._model.trunk(ids, self._model.table_VE, self._past)
        if self._cached:
            self._past = past
        self._token = self._linear(x[:, -1], self._model.head_weight_VE(self._model.table_VE)).argmax(
            dim=-1, keepdim=True
        )
        return int(self._token[0, 0])


class Plain:
    """The plain export in onnxruntime: `session.run` with numpy, past handed in and present handed out."""

    def __init__(self, path: str, layers: int, heads: int, head_dim: int):
        import numpy as np
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._np = np
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._past_names = [f"past_key_values.{i}.{part}" for i in range(layers) for part in ("key", "value")]
        self._outputs = ["logits", *(name.replace("past_key_values", "present") for name in self._past_names)]
        self._empty = [np.zeros((1, heads, 0, head_dim), np.float32)] * (2 * layers)
        self.detail = f"onnxruntime {ort.__version__}"

    def prefill(self, prompts: list[list[int]]) -> int:
        self._past = self._empty
        return self._next(prompts)

    def step(self) -> int:
        return self._next([[self._token]])

    def _next(self, ids: list[list[int]]) -> int:
        feed = dict(zip(self._past_names, self._past)) | {"input_ids": self._np.asarray(ids, self._np.int64)}
        logits, *self._past = self._session.run(self._outputs, feed)
        self._token = int(logits[0, -1].argmax())
        return self._token


class Genai:
    """onnxruntime-genai on a folder of its layout; it allocates its cache for `context` tokens, or for the model's."""

    def __init__(self, bundle: str, context: int | None = None, threads: int = 1):
        import onnxruntime_genai as og

        config = og.Config(bundle)
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._og, self._model = og, og.Model(config)
        with open(f"{bundle}/genai_config.json") as file:  # noqa: PTH123 - pathlib would be counted to the peer
            self._context = context or json.load(file)["model"]["context_length"]
        self.detail = f"onnxruntime-genai {og.__version__}"

    def prefill(self, prompts: list[list[int]]) -> int:
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=self._context, do_sample=False)
        self._generator = self._og.Generator(self._model, params)
        self._generator.append_tokens(prompts[0])
        return self.step()

    def step(self) -> int:
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])


class LlamaCpp:
    """llama.cpp through the low-level functions of llama-cpp-python; greedy choice with numpy on its logits."""

    def __init__(self, path: str, context: int, flash: int, f32_cache: bool = False):
        import ctypes

        import llama_cpp as lib
        import numpy as np

        @lib.llama_log_callback
        def silent(level: int, text: bytes, data: object) -> None:
            pass

        self._lib, self._silent = lib, silent
        lib.llama_log_set(silent, ctypes.c_void_p(0))
        lib.llama_backend_init()
        load = getattr(lib, "llama_model_load_from_file", None) or lib.llama_load_model_from_file
        self._model = load(path.encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = context
        params.n_threads = params.n_threads_batch = 1
        params.no_perf = True
        params.flash_attn_type = flash
        if f32_cache:
            params.type_k = params.type_v = lib.GGML_TYPE_F32
        self._context = lib.llama_init_from_model(self._model, params)
        assert self._context, f"{path}: llama.cpp makes no context"
        size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._logits_type = ctypes.c_float * size
        self._address = ctypes.addressof
        self._numpy = np
        self._token = (lib.llama_token * 1)(0)
        self._one = lib.llama_batch_get_one(self._token, 1)
        self.detail = f"llama-cpp-python {lib.__version__}"

    def prefill(self, prompts: list[list[int]]) -> int:
        lib = self._lib
        lib.llama_memory_clear(lib.llama_get_memory(self._context), False)
        self._ids = (lib.llama_token * len(prompts[0]))(*prompts[0])
        # A batch made this way asks for the logits of its last token only.
        return self._next(lib.llama_batch_get_one(self._ids, len(self._ids)))

    def step(self) -> int:
        return self._next(self._one)

    def _next(self, batch: Any) -> int:
        lib = self._lib
        status = lib.llama_decode(self._context, batch)
        assert status == 0, f"llama_decode gives {status}"
        found = lib.llama_get_logits_ith(self._context, -1)
        logits = self._numpy.frombuffer(self._logits_type.from_address(self._address(found.contents)), "float32")
        self._token[0] = int(logits.argmax())
        return self._token[0]


ENGINES = {"ryot": Ryot, "torch": Torch, "plain": Plain, "genai": Genai, "llama.cpp": LlamaCpp}


def main() -> None:
    os.sched_setaffinity(0, set(map(int, sys.argv[1].split(","))))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    _die_with_parent()
    engine: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        try:
            if do == "load":
                engine = ENGINES[request.pop("engine")](**request)
                answer = {"detail": engine.detail}
            elif do == "turn":
                answer = take_turn(engine, **request)
            elif do == "cold":
                answer = start_cold(**request)
            else:
                answer = {"bytes_per_s": [measure_read_bandwidth(size) for size in request["sizes"]]}
        except ImportError as error:
            answer = {"missing": str(error)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def take_turn(engine: Any, prompts: list[list[int]], steps: int) -> dict[str, Any]:
    """Time from ids to the first token, and milliseconds per token over the steps behind it."""
    step = engine.step
    begin = time.perf_counter_ns()
    tokens = [engine.prefill(prompts)]
    answered = time.perf_counter_ns()
    for _ in range(steps):
        tokens.append(step())
    end = time.perf_counter_ns()
    token_ms = (end - answered) / 1e6 / steps if steps else None
    return {"ttft_ms": (answered - begin) / 1e6, "token_ms": token_ms, "tokens": tokens}


def start_cold(prompt: list[int], steps: int, engine: str, **arguments: Any) -> dict[str, Any]:
    """Time from the process's start to the first token, and the peak resident size after `steps` more."""
    loaded = ENGINES[engine](**arguments)
    loaded.prefill([prompt])
    cold_start_ms = (time.monotonic() - float(os.environ[SPAWNED_VARIABLE])) * 1e3
    for _ in range(steps):
        loaded.step()
    with open("/proc/self/status") as file:  # noqa: PTH123 - pathlib would be counted to the engine
        peak_kib = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    return {"cold_start_ms": cold_start_ms, "peak_rss_bytes": peak_kib * 1024, "detail": loaded.detail}


def measure_read_bandwidth(size: int) -> float:
    """Bytes a second of reading `size` bytes of float32 with numpy, the best of its dot and matrix-vector products."""
    import numpy as np

    width = 1024
    array = np.ones((max(1, size // 4 // width), width), np.float32)
    flat, vector = array.reshape(-1), np.ones(width, np.float32)
    best = float("inf")
    for read in (lambda: np.dot(flat, flat), lambda: array @ vector):
        read()
        repeats = max(1, int(50e6 // array.nbytes))
        for _ in range(4):
            begin = time.perf_counter()
            for _ in range(repeats):
                read()
            best = min(best, (time.perf_counter() - begin) / repeats)
    return array.nbytes / best


def _die_with_parent() -> None:
    import ctypes  # every engine loads it anyway

    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL


if __name__ == "__main__":
    main()
