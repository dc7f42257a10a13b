"""ryot: train small language models on a cluster and ship them to edge CPUs as quantized ONNX."""

__version__ = "0.1.0"
