"""Every packaged recipe at every packaged size, and sizes of a user's own: what they come to, in figures."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ryot.config import find_named, list_named, resolve_variant
from ryot.errors import ConfigError

MODEL = (
    "architecture",
    "vocab_size",
    "dim",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "ff_dim",
    "max_seq_len",
    "tie_embeddings",
)
TRAIN = (
    "tokens",
    "batch_size",
    "learning_rate",
    "embedding_learning_rate",
    "head_learning_rate",
    "output_rate",
    "warmup_fraction",
    "schedule",
    "decay_fraction",
    "beta1",
    "beta2",
    "epsilon",
    "weight_decay",
    "normalize_embedding",
    "final_norm_init",
    "alternate_final_norm",
    "elastic_widths",
)
KERNELS = ("attention", "dtype", "compile", "loss_chunk", "fused_optimizer")

#: preset, variant -> tune, model, train and kernels as the fields above.
EXPECTED = {
    ('124m', 'baseline'): (False, ('opt', 24576, 768, 12, 12, 12, 3072, 1024, False), (1228800, 4, 0.00067, 0.00067, 0.00067, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('124m', 'elastic'): (True, ('llama', 24576, 384, 12, 12, 12, 384, 1024, True), (563200, 4, 0.0008, 0.0033, 0.0033, 1.0, 0.02, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, True, 0.04, True, (192, 288)), ('explicit', 'fp32', False, 256, True)),
    ('124m', 'optimized'): (True, ('llama', 24576, 384, 12, 12, 6, 384, 1024, True), (563200, 4, 0.0008, 0.0033, 0.0033, 1.0, 0.02, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, True, 0.04, True, ()), ('explicit', 'fp32', False, 256, True)),
    ('124m', 'rlvr'): (False, ('llama', 257, 256, 2, 4, 4, 512, 64, False), (75000, 16, 0.002, 0.006, 0.002, 1.0, 0.05, 'linear-decay', 0.6, 0.9, 0.97, 1e-10, 0.0, False, 1.0, False, ()), ('explicit', 'fp32', False, 0, False)),
    ('124m', 'wide'): (True, ('llama', 24576, 768, 12, 12, 6, 768, 1024, True), (614400, 4, 0.0008, 0.0033, 0.0033, 1.0, 0.02, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, True, 0.04, True, ()), ('explicit', 'fp32', False, 256, True)),
    ('124m', 'baseline+all'): (True, ('llama', 24576, 384, 12, 12, 6, 384, 1024, True), (1228800, 4, 0.0008, 0.0033, 0.0033, 1.0, 0.02, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, True, 0.04, True, ()), ('explicit', 'fp32', False, 256, True)),
    ('124m', 'baseline+adamw'): (False, ('opt', 24576, 768, 12, 12, 12, 3072, 1024, False), (1228800, 4, 0.00067, 0.00067, 0.00067, 1.0, 0.1, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('124m', 'baseline+architecture'): (False, ('llama', 24576, 768, 12, 12, 6, 3072, 1024, False), (1228800, 4, 0.00067, 0.00067, 0.00067, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('124m', 'baseline+kernels'): (True, ('opt', 24576, 768, 12, 12, 12, 3072, 1024, False), (1228800, 4, 0.00067, 0.00067, 0.00067, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('explicit', 'fp32', False, 256, True)),
    ('124m', 'baseline+narrow'): (False, ('opt', 24576, 384, 12, 12, 12, 384, 1024, False), (1228800, 4, 0.00067, 0.00067, 0.00067, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('124m', 'baseline+rates'): (False, ('opt', 24576, 768, 12, 12, 12, 3072, 1024, False), (1228800, 4, 0.0008, 0.0033, 0.0033, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('124m', 'baseline+tied'): (False, ('opt', 24576, 768, 12, 12, 12, 3072, 1024, True), (1228800, 4, 0.00067, 0.00067, 0.00067, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, True, 0.04, True, ()), ('sdpa', 'fp32', False, 0, False)),
    ('124m', 'baseline+warmup'): (False, ('opt', 24576, 768, 12, 12, 12, 3072, 1024, False), (1228800, 4, 0.00067, 0.00067, 0.00067, 1.0, 0.02, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('30m', 'baseline'): (False, ('opt', 4096, 512, 8, 8, 8, 2048, 512, False), (1228800, 4, 0.001, 0.001, 0.001, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('30m', 'elastic'): (True, ('llama', 4096, 256, 8, 8, 8, 256, 512, True), (563200, 4, 0.003, 0.01, 0.01, 1.0, 0.02, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, True, 0.04, True, (128, 192)), ('explicit', 'fp32', False, 256, True)),
    ('30m', 'optimized'): (True, ('llama', 4096, 256, 8, 8, 4, 256, 512, True), (563200, 4, 0.003, 0.01, 0.01, 1.0, 0.02, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, True, 0.04, True, ()), ('explicit', 'fp32', False, 256, True)),
    ('30m', 'rlvr'): (False, ('llama', 257, 256, 2, 4, 4, 512, 64, False), (75000, 16, 0.002, 0.006, 0.002, 1.0, 0.05, 'linear-decay', 0.6, 0.9, 0.97, 1e-10, 0.0, False, 1.0, False, ()), ('explicit', 'fp32', False, 0, False)),
    ('30m', 'wide'): (True, ('llama', 4096, 512, 8, 8, 4, 512, 512, True), (614400, 4, 0.003, 0.01, 0.01, 1.0, 0.02, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, True, 0.04, True, ()), ('explicit', 'fp32', False, 256, True)),
    ('30m', 'baseline+all'): (True, ('llama', 4096, 256, 8, 8, 4, 256, 512, True), (1228800, 4, 0.003, 0.01, 0.01, 1.0, 0.02, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, True, 0.04, True, ()), ('explicit', 'fp32', False, 256, True)),
    ('30m', 'baseline+adamw'): (False, ('opt', 4096, 512, 8, 8, 8, 2048, 512, False), (1228800, 4, 0.001, 0.001, 0.001, 1.0, 0.1, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('30m', 'baseline+architecture'): (False, ('llama', 4096, 512, 8, 8, 4, 2048, 512, False), (1228800, 4, 0.001, 0.001, 0.001, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('30m', 'baseline+kernels'): (True, ('opt', 4096, 512, 8, 8, 8, 2048, 512, False), (1228800, 4, 0.001, 0.001, 0.001, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('explicit', 'fp32', False, 256, True)),
    ('30m', 'baseline+narrow'): (False, ('opt', 4096, 256, 8, 8, 8, 256, 512, False), (1228800, 4, 0.001, 0.001, 0.001, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('30m', 'baseline+rates'): (False, ('opt', 4096, 512, 8, 8, 8, 2048, 512, False), (1228800, 4, 0.003, 0.01, 0.01, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('30m', 'baseline+tied'): (False, ('opt', 4096, 512, 8, 8, 8, 2048, 512, True), (1228800, 4, 0.001, 0.001, 0.001, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, True, 0.04, True, ()), ('sdpa', 'fp32', False, 0, False)),
    ('30m', 'baseline+warmup'): (False, ('opt', 4096, 512, 8, 8, 8, 2048, 512, False), (1228800, 4, 0.001, 0.001, 0.001, 1.0, 0.02, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('350m', 'baseline'): (False, ('opt', 24576, 1024, 24, 16, 16, 4096, 1024, False), (1228800, 4, 0.0005, 0.0005, 0.0005, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('350m', 'elastic'): (True, ('llama', 24576, 1024, 24, 16, 16, 2048, 1024, True), (563200, 4, 0.001, 0.005, 0.005, 1.0, 0.02, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, True, 0.04, True, (512, 768)), ('explicit', 'fp32', False, 256, True)),
    ('350m', 'optimized'): (True, ('llama', 24576, 1024, 24, 16, 4, 2048, 1024, True), (563200, 4, 0.001, 0.005, 0.005, 1.0, 0.02, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, True, 0.04, True, ()), ('explicit', 'fp32', False, 256, True)),
    ('350m', 'rlvr'): (False, ('llama', 257, 256, 2, 4, 4, 512, 64, False), (75000, 16, 0.002, 0.006, 0.002, 1.0, 0.05, 'linear-decay', 0.6, 0.9, 0.97, 1e-10, 0.0, False, 1.0, False, ()), ('explicit', 'fp32', False, 0, False)),
    ('350m', 'wide'): (True, ('llama', 24576, 1024, 24, 16, 4, 2048, 1024, True), (614400, 4, 0.001, 0.005, 0.005, 1.0, 0.02, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, True, 0.04, True, ()), ('explicit', 'fp32', False, 256, True)),
    ('350m', 'baseline+all'): (True, ('llama', 24576, 1024, 24, 16, 4, 2048, 1024, True), (1228800, 4, 0.001, 0.005, 0.005, 1.0, 0.02, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, True, 0.04, True, ()), ('explicit', 'fp32', False, 256, True)),
    ('350m', 'baseline+adamw'): (False, ('opt', 24576, 1024, 24, 16, 16, 4096, 1024, False), (1228800, 4, 0.0005, 0.0005, 0.0005, 1.0, 0.1, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('350m', 'baseline+architecture'): (False, ('llama', 24576, 1024, 24, 16, 4, 4096, 1024, False), (1228800, 4, 0.0005, 0.0005, 0.0005, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('350m', 'baseline+kernels'): (True, ('opt', 24576, 1024, 24, 16, 16, 4096, 1024, False), (1228800, 4, 0.0005, 0.0005, 0.0005, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('explicit', 'fp32', False, 256, True)),
    ('350m', 'baseline+narrow'): (False, ('opt', 24576, 1024, 24, 16, 16, 2048, 1024, False), (1228800, 4, 0.0005, 0.0005, 0.0005, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('350m', 'baseline+rates'): (False, ('opt', 24576, 1024, 24, 16, 16, 4096, 1024, False), (1228800, 4, 0.001, 0.005, 0.005, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('350m', 'baseline+tied'): (False, ('opt', 24576, 1024, 24, 16, 16, 4096, 1024, True), (1228800, 4, 0.0005, 0.0005, 0.0005, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, True, 0.04, True, ()), ('sdpa', 'fp32', False, 0, False)),
    ('350m', 'baseline+warmup'): (False, ('opt', 24576, 1024, 24, 16, 16, 4096, 1024, False), (1228800, 4, 0.0005, 0.0005, 0.0005, 1.0, 0.02, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('medium', 'baseline'): (False, ('opt', 8192, 1024, 6, 16, 16, 4096, 512, False), (1228800, 4, 0.0005, 0.0005, 0.0005, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('medium', 'elastic'): (True, ('llama', 8192, 1024, 6, 16, 16, 2048, 512, True), (563200, 4, 0.001, 0.005, 0.005, 1.0, 0.02, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, True, 0.04, True, (512, 768)), ('explicit', 'fp32', False, 256, True)),
    ('medium', 'optimized'): (True, ('llama', 8192, 1024, 6, 16, 4, 2048, 512, True), (563200, 4, 0.001, 0.005, 0.005, 1.0, 0.02, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, True, 0.04, True, ()), ('explicit', 'fp32', False, 256, True)),
    ('medium', 'rlvr'): (False, ('llama', 257, 256, 2, 4, 4, 512, 64, False), (75000, 16, 0.002, 0.006, 0.002, 1.0, 0.05, 'linear-decay', 0.6, 0.9, 0.97, 1e-10, 0.0, False, 1.0, False, ()), ('explicit', 'fp32', False, 0, False)),
    ('medium', 'wide'): (True, ('llama', 8192, 1024, 6, 16, 4, 2048, 512, True), (614400, 4, 0.001, 0.005, 0.005, 1.0, 0.02, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, True, 0.04, True, ()), ('explicit', 'fp32', False, 256, True)),
    ('medium', 'baseline+all'): (True, ('llama', 8192, 1024, 6, 16, 4, 2048, 512, True), (1228800, 4, 0.001, 0.005, 0.005, 1.0, 0.02, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, True, 0.04, True, ()), ('explicit', 'fp32', False, 256, True)),
    ('medium', 'baseline+adamw'): (False, ('opt', 8192, 1024, 6, 16, 16, 4096, 512, False), (1228800, 4, 0.0005, 0.0005, 0.0005, 1.0, 0.1, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('medium', 'baseline+architecture'): (False, ('llama', 8192, 1024, 6, 16, 4, 4096, 512, False), (1228800, 4, 0.0005, 0.0005, 0.0005, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('medium', 'baseline+kernels'): (True, ('opt', 8192, 1024, 6, 16, 16, 4096, 512, False), (1228800, 4, 0.0005, 0.0005, 0.0005, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('explicit', 'fp32', False, 256, True)),
    ('medium', 'baseline+narrow'): (False, ('opt', 8192, 1024, 6, 16, 16, 2048, 512, False), (1228800, 4, 0.0005, 0.0005, 0.0005, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('medium', 'baseline+rates'): (False, ('opt', 8192, 1024, 6, 16, 16, 4096, 512, False), (1228800, 4, 0.001, 0.005, 0.005, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('medium', 'baseline+tied'): (False, ('opt', 8192, 1024, 6, 16, 16, 4096, 512, True), (1228800, 4, 0.0005, 0.0005, 0.0005, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, True, 0.04, True, ()), ('sdpa', 'fp32', False, 0, False)),
    ('medium', 'baseline+warmup'): (False, ('opt', 8192, 1024, 6, 16, 16, 4096, 512, False), (1228800, 4, 0.0005, 0.0005, 0.0005, 1.0, 0.02, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('reference', 'baseline'): (False, ('opt', 2048, 256, 2, 4, 4, 512, 128, False), (1228800, 8, 0.002, 0.002, 0.002, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('reference', 'elastic'): (True, ('llama', 2048, 128, 2, 4, 4, 128, 128, True), (563200, 8, 0.003, 0.01, 0.01, 3.0, 0.02, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, True, 0.04, True, (64, 96)), ('explicit', 'fp32', False, 256, True)),
    ('reference', 'optimized'): (True, ('llama', 2048, 128, 2, 4, 2, 128, 128, True), (563200, 8, 0.003, 0.01, 0.01, 3.0, 0.02, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, True, 0.04, True, ()), ('explicit', 'fp32', False, 256, True)),
    ('reference', 'rlvr'): (False, ('llama', 257, 256, 2, 4, 4, 512, 64, False), (75000, 16, 0.002, 0.006, 0.002, 1.0, 0.05, 'linear-decay', 0.6, 0.9, 0.97, 1e-10, 0.0, False, 1.0, False, ()), ('explicit', 'fp32', False, 0, False)),
    ('reference', 'wide'): (True, ('llama', 2048, 256, 2, 4, 2, 256, 128, True), (614400, 8, 0.003, 0.01, 0.01, 1.0, 0.02, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, True, 0.04, True, ()), ('explicit', 'fp32', False, 256, True)),
    ('reference', 'baseline+all'): (True, ('llama', 2048, 128, 2, 4, 2, 128, 128, True), (1228800, 8, 0.003, 0.01, 0.01, 3.0, 0.02, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, True, 0.04, True, ()), ('explicit', 'fp32', False, 256, True)),
    ('reference', 'baseline+adamw'): (False, ('opt', 2048, 256, 2, 4, 4, 512, 128, False), (1228800, 8, 0.002, 0.002, 0.002, 1.0, 0.1, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('reference', 'baseline+architecture'): (False, ('llama', 2048, 256, 2, 4, 2, 512, 128, False), (1228800, 8, 0.002, 0.002, 0.002, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('reference', 'baseline+kernels'): (True, ('opt', 2048, 256, 2, 4, 4, 512, 128, False), (1228800, 8, 0.002, 0.002, 0.002, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('explicit', 'fp32', False, 256, True)),
    ('reference', 'baseline+narrow'): (False, ('opt', 2048, 128, 2, 4, 4, 128, 128, False), (1228800, 8, 0.002, 0.002, 0.002, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('reference', 'baseline+rates'): (False, ('opt', 2048, 256, 2, 4, 4, 512, 128, False), (1228800, 8, 0.003, 0.01, 0.01, 3.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('reference', 'baseline+tied'): (False, ('opt', 2048, 256, 2, 4, 4, 512, 128, True), (1228800, 8, 0.002, 0.002, 0.002, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, True, 0.04, True, ()), ('sdpa', 'fp32', False, 0, False)),
    ('reference', 'baseline+warmup'): (False, ('opt', 2048, 256, 2, 4, 4, 512, 128, False), (1228800, 8, 0.002, 0.002, 0.002, 1.0, 0.02, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('small', 'baseline'): (False, ('opt', 4096, 512, 4, 8, 8, 1024, 256, False), (1228800, 4, 0.001, 0.001, 0.001, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('small', 'elastic'): (True, ('llama', 4096, 256, 4, 8, 8, 256, 256, True), (563200, 4, 0.003, 0.01, 0.01, 1.0, 0.02, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, True, 0.04, True, (128, 192)), ('explicit', 'fp32', False, 256, True)),
    ('small', 'optimized'): (True, ('llama', 4096, 256, 4, 8, 4, 256, 256, True), (563200, 4, 0.003, 0.01, 0.01, 1.0, 0.02, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, True, 0.04, True, ()), ('explicit', 'fp32', False, 256, True)),
    ('small', 'rlvr'): (False, ('llama', 257, 256, 2, 4, 4, 512, 64, False), (75000, 16, 0.002, 0.006, 0.002, 1.0, 0.05, 'linear-decay', 0.6, 0.9, 0.97, 1e-10, 0.0, False, 1.0, False, ()), ('explicit', 'fp32', False, 0, False)),
    ('small', 'wide'): (True, ('llama', 4096, 512, 4, 8, 4, 512, 256, True), (614400, 4, 0.003, 0.01, 0.01, 1.0, 0.02, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, True, 0.04, True, ()), ('explicit', 'fp32', False, 256, True)),
    ('small', 'baseline+all'): (True, ('llama', 4096, 256, 4, 8, 4, 256, 256, True), (1228800, 4, 0.003, 0.01, 0.01, 1.0, 0.02, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, True, 0.04, True, ()), ('explicit', 'fp32', False, 256, True)),
    ('small', 'baseline+adamw'): (False, ('opt', 4096, 512, 4, 8, 8, 1024, 256, False), (1228800, 4, 0.001, 0.001, 0.001, 1.0, 0.1, 'linear-decay', 0.6, 0.7, 0.97, 1e-10, 0.0, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('small', 'baseline+architecture'): (False, ('llama', 4096, 512, 4, 8, 4, 1024, 256, False), (1228800, 4, 0.001, 0.001, 0.001, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('small', 'baseline+kernels'): (True, ('opt', 4096, 512, 4, 8, 8, 1024, 256, False), (1228800, 4, 0.001, 0.001, 0.001, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('explicit', 'fp32', False, 256, True)),
    ('small', 'baseline+narrow'): (False, ('opt', 4096, 256, 4, 8, 8, 256, 256, False), (1228800, 4, 0.001, 0.001, 0.001, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('small', 'baseline+rates'): (False, ('opt', 4096, 512, 4, 8, 8, 1024, 256, False), (1228800, 4, 0.003, 0.01, 0.01, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
    ('small', 'baseline+tied'): (False, ('opt', 4096, 512, 4, 8, 8, 1024, 256, True), (1228800, 4, 0.001, 0.001, 0.001, 1.0, 0.1, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, True, 0.04, True, ()), ('sdpa', 'fp32', False, 0, False)),
    ('small', 'baseline+warmup'): (False, ('opt', 4096, 512, 4, 8, 8, 1024, 256, False), (1228800, 4, 0.001, 0.001, 0.001, 1.0, 0.02, 'linear-decay', 0.6, 0.8, 0.98, 1e-08, 0.01, False, 1.0, False, ()), ('sdpa', 'fp32', False, 0, False)),
}  # fmt: skip


@pytest.mark.parametrize(("preset", "variant"), EXPECTED)
def test_a_packaged_recipe_at_a_packaged_size_is_what_it_was(preset: str, variant: str) -> None:
    found = resolve_variant(variant, preset)
    assert EXPECTED[preset, variant] == (
        found.tune,
        tuple(getattr(found.model, name) for name in MODEL),
        tuple(getattr(found.train, name) for name in TRAIN),
        tuple(getattr(found.kernels, name) for name in KERNELS),
    )


def test_the_table_has_every_recipe_part_and_size() -> None:
    variants = {*list_named("variants"), "baseline+all", *(f"baseline+{p}" for p in list_named("optimizations"))}
    variants -= {"finetune", "lora"}  # of the size of the model that they start from
    assert set(EXPECTED) == {(preset, variant) for preset in list_named("presets") for variant in variants}


@pytest.mark.parametrize("preset", ["30m", "124m", "350m"])
def test_a_preset_has_the_parameters_that_its_name_says(preset: str) -> None:
    named = float(preset.removesuffix("m")) * 1e6
    assert resolve_variant("baseline", preset).model.num_parameters == pytest.approx(named, rel=0.02)


def test_rates_fall_with_width_and_never_rise() -> None:
    widths = {p: resolve_variant("wide", p).model.dim for p in list_named("presets")}
    for recipe in ("baseline", "optimized", "wide", "elastic"):
        for rate in ("learning_rate", "embedding_learning_rate"):
            found = {
                p: getattr(resolve_variant(recipe, p).train, rate) for p in sorted(widths, key=lambda p: widths[p])
            }
            # Swept with ten times as many tokens as the others, for which less is right.
            assert found.pop("124m") <= found["30m"], (recipe, rate)
            assert list(found.values()) == sorted(found.values(), reverse=True), (recipe, rate)


@pytest.mark.parametrize("preset", ["reference", "small", "medium"])
@pytest.mark.parametrize("variant", ["baseline", "optimized", "wide", "elastic", "baseline+all"])
def test_a_copied_preset_under_another_name_is_the_same_size(preset: str, variant: str, tmp_path: Path) -> None:
    copy = shutil.copy(find_named("presets", preset), tmp_path / "mine.toml")
    assert resolve_variant(variant, str(copy)) == resolve_variant(variant, preset)


@pytest.mark.parametrize(
    ("dim", "heads", "shape"),
    [
        # dim, num_heads, num_kv_heads, ff_dim of `optimized`: heads keep 16 wide at least, kv heads divide them.
        (64, 4, (32, 2, 1, 32)),
        (384, 6, (192, 6, 3, 192)),
        (768, 12, (384, 12, 6, 384)),
        (2048, 32, (2048, 32, 8, 4096)),
    ],
)
def test_recipes_fit_sizes_that_nobody_thought_of(dim: int, heads: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        f"[model]\nvocab_size = 512\ndim = {dim}\nnum_layers = 2\nnum_heads = {heads}\n"
        f"ff_dim = {2 * dim}\nmax_seq_len = 64\n"
    )
    model = resolve_variant("optimized", str(path)).model
    assert (model.dim, model.num_heads, model.num_kv_heads, model.ff_dim) == shape
    for name in ("baseline", "wide", "elastic", "baseline+all"):
        assert resolve_variant(name, str(path)).model.num_layers == 2


def test_a_figure_that_is_given_stands_above_one_that_is_worked_out(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    text = find_named("variants", "optimized").read_text()
    recipe.write_text(text.replace("[model]\n", "[model]\nff_dim = 96\n"))
    assert resolve_variant(str(recipe), "reference").model.ff_dim == 96
    recipe.write_text(f"{text}\n[preset.reference.model]\ndim = 192\n")
    changed = resolve_variant(str(recipe), "reference").model
    assert (changed.dim, changed.num_kv_heads, changed.ff_dim) == (192, 2, 192)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[shape]\nwidht = 0.5", "shape: key: 'widht' is not known; did you mean 'width'"),
        ("[shape]\nwidth = 0", r"shape\.width: got 0, expected a number above 0"),
        ("[shape]\nwidth = 0.01", r"shape\.width: got 0.01, expected a dim in steps of 16"),
        ("[from_dim.wide.train]\ntokens = 1", "from_dim: got 'wide', expected a width, as in"),
        ("[from_dim.512.trian]\ntokens = 1", "from_dim.512: key: 'trian' is not known; did you mean 'train'"),
    ],
)
def test_a_shape_that_cannot_be_meant_is_refused(change: str, message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(find_named("variants", "wide").read_text().split("[shape]")[0] + change)
    with pytest.raises(ConfigError, match=message):
        resolve_variant(str(recipe), "reference")
