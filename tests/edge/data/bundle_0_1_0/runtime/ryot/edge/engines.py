"""The choice between engines: `capi` where it works, onnxruntime's Python binding elsewhere."""

from __future__ import annotations

from ryot.edge.bundle import Bundle
from ryot.edge.engine import Engine, EngineUnavailable
from ryot.errors import ConfigError

#: `auto` takes `capi` where it works and says so where it does not.
ENGINES = ("auto", "capi", "python")


def open_decoder(
    bundle: Bundle, *, threads: int = 1, batch_size: int = 1, max_len: int | None = None, engine: str = "auto"
) -> Engine:
    """The bundle in the engine asked for. Raises what `Engine` raises, and `EngineUnavailable` for a named engine.

    `auto` falls back from `capi` to `python` with a warning; `type(decoder).__name__` says which one it is.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine: got {engine!r}, expected one of {', '.join(ENGINES)}")
    if engine != "python":
        from ryot.edge.capi import CapiDecoder

        try:
            return CapiDecoder(bundle, threads=threads, batch_size=batch_size, max_len=max_len)
        except EngineUnavailable as error:
            if engine == "capi":
                raise
            import logging  # not needed where all is well, and slow to import

            logging.getLogger(__name__).warning(
                "%s; going on with onnxruntime's Python binding, which is slower", error
            )
    from ryot.edge.session import Decoder

    return Decoder(bundle, threads=threads, batch_size=batch_size, max_len=max_len)
