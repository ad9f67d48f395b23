"""The learnt weights of a committed checkpoint of any number of ranks: in parts, or each parameter whole."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trainer.state.checkpoint.manifest import CheckpointManifest, read_elements
from trainer.state.checkpoint.shard import Key
from trainer.state.optimizer import MASTER, Interval
from trainer.store.store import Store


def master_weights(folder: Store, manifest: CheckpointManifest) -> dict[str, Tensor]:
    """Every trained parameter, whole, in fp32, by its name in the model."""
    return _whole(folder, manifest, torch.float32)


def _whole(folder: Store, manifest: CheckpointManifest, dtype: torch.dtype) -> dict[str, Tensor]:
    flat = _masters(folder, manifest, {name: (0, numel) for name, numel in manifest.numels.items()}, dtype)
    return {name: tensor.view(manifest.shapes[name]) for name, tensor in flat.items()}


def _masters(
    folder: Store, manifest: CheckpointManifest, wanted: Mapping[str, Interval], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The wanted elements of each parameter, flat, rounded to `dtype` as they are read."""
    found = {name: torch.empty(end - begin, dtype=dtype) for name, (begin, end) in wanted.items()}
    places = {Key(name, MASTER): interval for name, interval in wanted.items()}
    for ((name, _), begin, end), data in read_elements(folder, manifest, places):
        first = wanted[name][0]
        found[name][begin - first : end - first] = torch.frombuffer(bytearray(data), dtype=torch.float32)
    return found


@dataclass(frozen=True, eq=False)
class LearntWeights:
    """A checkpoint's weights of each parameter that learns, by its name in the model, in `dtype`, the type of the
    training's forward pass.
    """

    run: Store
    manifest: CheckpointManifest
    dtype: torch.dtype

    def part(self, name: str, begin: int, end: int) -> Tensor:
        """Elements [begin, end) of the flattened parameter, without reading any others. Any thread may call it."""
        return _masters(self.run, self.manifest, {name: (begin, end)}, self.dtype)[name]

    @cached_property
    def whole(self) -> dict[str, Tensor]:
        """Every parameter, by its name in the model."""
        return _whole(self.run, self.manifest, self.dtype)

    def __getitem__(self, name: str) -> Tensor:
        """The whole parameter; the first look-up reads all parameters into memory."""
        return self.whole[name]
