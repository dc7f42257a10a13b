"""The arrays of a checkpoint's decoder, whatever names its file gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ryot.models.registry import find_family, tensor_maps
from ryot.models.spec import DecoderSpec
from ryot.models.tensors import FloatArray, check_copies, check_names, load_arrays


def read_arrays(
    spec: DecoderSpec, found: Iterable[str], load: Callable[[str], FloatArray], where: str
) -> Iterator[tuple[str, FloatArray]]:
    """Each array of a decoder with its name, one at a time, from the tensors whose names are `found`.

    `load` gives one of them in float32. Raises `CheckpointError` at once for a tensor that is missing or not known, or
    a tied head that is not the embedding, and later as `ryot.models.tensors.load_arrays` says.
    """
    family, maps = find_family(spec.family, where), tensor_maps(spec)
    optional = {*family.unused_tensors(spec), *(entry.copy for entry in maps)}
    stored = {name: name for name in found}
    for name in (*optional, *(name for entry in maps for name in entry.tensors)):
        if name not in stored and (other := family.other_name(name)) in stored:
            stored[name] = stored.pop(other)
    check_names(spec, maps, stored, optional, where)

    def load_stored(name: str) -> FloatArray:
        return load(stored[name])

    check_copies(maps, stored, load_stored, where)
    return load_arrays(spec, maps, load_stored, where)
