"""Low-rank adapters: small matrices beside frozen ones, kept in `peft`'s file layout and merged for export.

    # … any leading dims, K input features, N output features, r rank, P adapters of one matrix

Ours packs query, key and value (and gate and up) into one matrix. Each of the modules that Hugging Face has for it gets
an adapter of its own, of rows of our matrix, so that what is trained is what `peft` trains; the adapters of one matrix
are multiplied together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ryot.adaptation import ALL_LINEAR, LoraConfig
from ryot.errors import ConfigError
from ryot.models.registry import tensor_maps
from ryot.models.spec import DecoderSpec, linear_names
from ryot.models.tensors import FloatArray, Layout, read_layout, write_layout
from ryot.train.functions import lora_linear
from ryot.train.model import Decoder

#: `peft`'s names.
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """A linear module as transformers names it, and the rows of our matrix that it is."""

    name: str
    start: int
    stop: int
    layout: Layout

    @property
    def leaf(self) -> str:
        """The last part of its name, by which targets name it."""
        return self.name.rpartition(".")[2]


class LoraLinear(nn.Linear):
    """A frozen linear layer with adapters; takes over the parameters of the one that it stands in for."""

    def __init__(self, base: nn.Linear, modules: list[Module], config: LoraConfig):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.modules_of_peft = modules
        self.scale = config.alpha / config.rank
        self.rank = config.rank
        # torch's own start for a linear layer; with B zero the model begins as it was.
        device = base.weight.device
        bound = 1 / math.sqrt(self.in_features)
        A = torch.empty(len(modules) * config.rank, self.in_features, device=device).uniform_(-bound, bound)
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.ParameterList(
            nn.Parameter(torch.zeros(m.stop - m.start, config.rank, device=device)) for m in modules
        )

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return lora_linear(x, self, self.lora_A, self._wide_B(), self.scale)
        z = F.linear(x, self.lora_A)
        return F.linear(x, self.weight, self.bias) + F.linear(z, self._wide_B()) * self.scale

    def _wide_B(self) -> Tensor:
        """All adapters' B as one matrix [N, P r], each in its own rows and columns."""
        [first, *others] = self.modules_of_peft
        if not others and first.stop - first.start == self.out_features:
            only: Tensor = self.lora_B[0]
            return only
        wide = self.lora_A.new_zeros((self.out_features, len(self.lora_A)))
        for i, (module, B) in enumerate(zip(self.modules_of_peft, self.lora_B)):
            wide[module.start : module.stop, i * self.rank : (i + 1) * self.rank] = B
        return wide

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The matrix [N, K] that computes the same without adapters."""
        return torch.addmm(self.weight, self._wide_B(), self.lora_A, alpha=self.scale)


def linear_modules(spec: DecoderSpec) -> dict[str, list[Module]]:
    """The modules of transformers that each matrix of the layers is made of."""
    maps = {entry.name: entry for entry in tensor_maps(spec)}
    found: dict[str, list[Module]] = {}
    for name in linear_names(spec):
        if not name.startswith("layers."):
            continue
        entry, start = maps[f"{name}.weight"], 0
        found[name] = []
        for tensor, rows in zip(entry.tensors, entry.rows or (0,)):
            stop = start + rows
            found[name].append(Module(name=tensor.removesuffix(".weight"), start=start, stop=stop, layout=entry.layout))
            start = stop
    return found


def check_targets(spec: DecoderSpec, config: LoraConfig) -> None:
    """Raise `ConfigError` for a target that no module has."""
    leaves = sorted({m.leaf for of_matrix in linear_modules(spec).values() for m in of_matrix})
    for target in config.targets:
        if target != ALL_LINEAR and target not in leaves:
            raise ConfigError(
                f"lora.targets: {target!r} matches no module of this {spec.family} model",
                hint=f"it has {', '.join(leaves)}; or give {ALL_LINEAR}",
            )


def add_adapters(model: Decoder, config: LoraConfig) -> None:
    """Freeze a decoder and give its targets adapters, drawn from torch's generator.

    Raises `ConfigError` for a target that no module has.
    """
    check_targets(model.spec, config)
    model.requires_grad_(False)
    for name, of_matrix in linear_modules(model.spec).items():
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        chosen = [_with_rows(m, base) for m in of_matrix if {m.leaf, ALL_LINEAR} & set(config.targets)]
        if chosen:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LoraLinear(base, chosen, config))


def adapters(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The layers with adapters, by name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def merged_state(model: Decoder) -> dict[str, Callable[[], Tensor]]:
    """The decoder's parameters, each made when it is asked for: with its adapters merged into it."""

    def as_it_is(tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: tensor

    state = {name: as_it_is(p) for name, p in model.state_dict().items() if ".lora_" not in name}
    return state | {f"{name}.weight": module.merged_weight for name, module in adapters(model)}


def adapter_tensors(model: Decoder) -> dict[str, Tensor]:
    """The adapters under `peft`'s names."""
    tensors: dict[str, Tensor] = {}
    for _, layer in adapters(model):
        for i, (module, B) in enumerate(zip(layer.modules_of_peft, layer.lora_B)):
            A = layer.lora_A[i * layer.rank : (i + 1) * layer.rank]
            rows = write_layout(model.spec, _row_layout(module.layout), B.detach().cpu().numpy())
            tensors[f"{_PREFIX}{module.name}.lora_A.weight"] = A.detach().cpu().contiguous()
            tensors[f"{_PREFIX}{module.name}.lora_B.weight"] = torch.from_numpy(np.ascontiguousarray(rows))
    return tensors


@torch.no_grad()
def load_adapter_tensors(model: Decoder, tensors: Mapping[str, Tensor]) -> None:
    """Set the adapters of a model to what `adapter_tensors` gave of the same."""
    for _, layer in adapters(model):
        for i, (module, B) in enumerate(zip(layer.modules_of_peft, layer.lora_B)):
            layer.lora_A[i * layer.rank : (i + 1) * layer.rank] = tensors[f"{_PREFIX}{module.name}.lora_A.weight"]
            rows: FloatArray = tensors[f"{_PREFIX}{module.name}.lora_B.weight"].numpy()
            B.copy_(torch.from_numpy(read_layout(model.spec, _row_layout(module.layout), rows)))


def adapter_config(model: Decoder, config: LoraConfig, source: str) -> dict[str, object]:
    """`adapter_config.json` as `peft` reads it."""
    modules = [m for _, layer in adapters(model) for m in layer.modules_of_peft]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({m.leaf for m in modules}),
        "fan_in_fan_out": any(m.layout == "transposed" for m in modules),
        "bias": "none",
        "inference_mode": True,
    }


def adapter_files(model: Decoder, config: LoraConfig, source: str) -> dict[str, bytes]:
    """The files of an adapter, by name."""
    import safetensors.torch

    text = json.dumps(adapter_config(model, config, source), indent=2, sort_keys=True) + "\n"
    weights: bytes = safetensors.torch.save(adapter_tensors(model), metadata={"format": "pt"})
    return {ADAPTER_CONFIG: text.encode(), ADAPTER_WEIGHTS: weights}


def trainable(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """Those that are learned."""
    return [(name, p) for name, p in parameters if p.requires_grad]


def _with_rows(module: Module, base: nn.Linear) -> Module:
    """The module with its rows; one that is the whole matrix has no number of them before."""
    stop = module.stop if module.stop > module.start else base.out_features
    return Module(name=module.name, start=module.start, stop=stop, layout=module.layout)


def _row_layout(layout: Layout) -> Layout:
    """What a layout does to output features: `peft` keeps B as [out, r] also where the matrix is transposed."""
    return "rows" if layout == "transposed" else layout
