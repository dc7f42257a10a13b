"""What runs on the device: bundles, sessions, sampling, generation and the measurement protocol.

Needs numpy, onnxruntime, tokenizers and the standard library; a byte copy of this package travels in every bundle.
"""
