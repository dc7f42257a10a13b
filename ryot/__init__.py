"""ryot: train small language models on a cluster and ship them to edge CPUs as quantized ONNX."""

import os

__version__ = "0.1.0"

#: Switches by which the libraries that we load do not report home. A library reads its switch when it is loaded, so
#: they are set here, before any module of ours can load one; processes that we start inherit them.
TELEMETRY_SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime and onnxruntime-genai
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, and transformers by it
    "RAY_USAGE_STATS_ENABLED": "0",
}

for _name, _value in TELEMETRY_SWITCHES.items():
    os.environ.setdefault(_name, _value)  # what the user has set wins
