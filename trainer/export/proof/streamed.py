"""A model in transformers whose decoder layers have their weights only for their turn.

It is used if memory does not hold the whole model.

At its turn a layer's weights come from the files again. If the base is quantized, they come from the 4 bits that were
made once and stay on the host.

transformers itself knows which stored tensors make a weight, by its offload to disk. It reads those that need no
conversion from their files, and writes the others (as of most mixtures) to a folder. accelerate's hooks would then move
the weights of one module at a time. They are removed, because modules of a layer read each other's weights, and PEFT
wraps the modules.
"""

from collections.abc import Callable, Collection
from copy import deepcopy
from functools import partial
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from bitsandbytes import functional as bnb
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trainer.config import Quant
from trainer.model.held import HeldFormat
from trainer.model.held.blockwise import AT_ONCE
from trainer.model.parts import decoder_layers


class StreamedLayers:
    """The layers of one model.

    transformers may write converted weights to `folder` as long as the model is used.
    """

    def __init__(self, folder: Path) -> None:
        self.options: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": str(folder)}
        self._supplies: dict[nn.Parameter, Callable[[], Tensor]] = {}
        self._layers: list[nn.Module] = []

    def take_over(self, model: Any) -> None:
        """Take over the weights of a model that `from_pretrained` has made with these `options`."""
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    self._supplies[parameter] = partial(getitem, module._hf_hook.weights_map, name)
        remove_hook_from_module(model, recurse=True)
        del model.hf_device_map  # PEFT would use it to hook the model again
        model.tie_weights()

    def begin(self, model: Any, alike: nn.Module, device: torch.device) -> None:
        """Read the weights outside the decoder layers, and have each layer read its own from now on.

        All have the types that they have in `alike`. `model` is the one that was taken over, or a part of it.
        """
        self._layers = list(decoder_layers(model) or ())
        inside = {parameter for layer in self._layers for parameter in layer.parameters()}
        made: dict[nn.Parameter, nn.Parameter] = {}
        for path, module in model.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter not in made:
                    dtype = alike.get_parameter(f"{path}.{name}").dtype
                    made[parameter] = self._placed(parameter, parameter in inside, dtype, device)
                setattr(module, name, made[parameter])
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        for layer in self._layers:
            layer.register_forward_pre_hook(self._fill)
            layer.register_forward_hook(self._empty, always_call=True)

    def _placed(self, parameter: nn.Parameter, later: bool, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
        read = self._supplies.pop(parameter, lambda: parameter.data)

        def supply() -> Tensor:
            return read().to(device, dtype)

        values = _nothing(parameter.shape, dtype, device) if later else supply()
        placed = nn.Parameter(values, requires_grad=False)
        if later:
            self._supplies[placed] = supply
        return placed

    def quantize(self, model: nn.Module, quant: Quant, dtype: torch.dtype, weights: Collection[str]) -> None:
        """Give the `weights`, by name, the values that bitsandbytes leaves of them, like `plain.quantize`."""
        for name, parameter in model.named_parameters():
            if name not in weights:
                continue
            is_transpose = isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
            if parameter in self._supplies:
                self._supplies[parameter] = PackedWeight(self._supplies[parameter](), quant, dtype, is_transpose).values
                parameter.data = _nothing(parameter.shape, dtype, parameter.device)
            else:
                parameter.data = PackedWeight(parameter.data, quant, dtype, is_transpose).values()

    def at_each_turn(self, module: nn.Module, change: Callable[[], None], undo: Callable[[], None]) -> bool:
        """Return whether `module` belongs to a streamed layer.

        If so, `change` is called each time that its weights have come, and `undo` when they go.
        """
        for layer in self._layers:
            if any(module is part for part in layer.modules()):
                layer.register_forward_pre_hook(lambda *_: change())
                layer.register_forward_hook(lambda *_: undo(), always_call=True)
                return True
        return False

    def _fill(self, layer: nn.Module, _inputs: Any) -> None:
        for parameter in layer.parameters():
            if parameter in self._supplies:
                parameter.data = self._supplies[parameter]()

    def _empty(self, layer: nn.Module, _inputs: Any, _outputs: Any) -> None:
        for parameter in layer.parameters():
            if parameter in self._supplies:
                parameter.data = _nothing(parameter.shape, parameter.dtype, parameter.device)


def _nothing(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of a single value, for callers that ask only for its shape, type and device."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def bnb_form(quant: Quant) -> dict[str, Any]:
    """Return the settings under bitsandbytes' names."""
    return {"blocksize": quant.block_size, "quant_type": quant.type, "compress_statistics": quant.double}


class PackedWeight:
    """A matrix, or a stack of them, in few bits on the host.

    bitsandbytes packs it if it has a layer for it. Each matrix is quantized and dequantized as one row: on a CPU,
    bitsandbytes 0.50 misreads matrices whose rows are not whole blocks. If the weight `is_transpose`, its transpose is
    quantized.
    """

    def __init__(self, weight: Tensor, quant: Quant, dtype: torch.dtype, is_transpose: bool = False) -> None:
        self._is_transpose = is_transpose
        weight = weight.t().contiguous() if is_transpose else weight
        self._like = _nothing(weight.shape, dtype, weight.device)
        held: HeldFormat = quant.held
        pack = partial(_by_bitsandbytes, quant) if held.in_linear4bit else partial(_by_format, held)
        self._matrices = [pack(matrix.to(dtype)) for matrix in weight.view(-1, *weight.shape[-2:])]

    def values(self) -> Tensor:
        """Return the values that the weight's bits give, on the device and in the type that it had."""
        values = torch.empty_like(self._like, memory_format=torch.contiguous_format)
        for matrix, unpack in zip(values.view(-1, *values.shape[-2:]), self._matrices, strict=True):
            matrix.copy_(unpack(values.device).view_as(matrix))
        return values.t().contiguous() if self._is_transpose else values


def _by_bitsandbytes(quant: Quant, matrix: Tensor) -> Callable[[torch.device], Tensor]:
    """Pack a matrix with bitsandbytes itself, because the proof's other side must not use our code.

    Returns the function that unpacks it.
    """
    assert matrix.numel() <= AT_ONCE, "bitsandbytes cannot count so many"
    packed, kept = bnb.quantize_4bit(matrix.flatten(), **bnb_form(quant))
    packed = packed.cpu()
    kept.to("cpu")

    def unpack(device: torch.device) -> Tensor:
        state = deepcopy(kept)
        state.to(device)
        return bnb.dequantize_4bit(packed.to(device), state)

    return unpack


def _by_format(held: HeldFormat, matrix: Tensor) -> Callable[[torch.device], Tensor]:
    (rows, columns), parts = matrix.shape, dict[str, Tensor]()
    assert held.spanning is None
    for name, part in held.encode(matrix.flatten(), columns).items():
        parts[name] = part.cpu()

    def unpack(device: torch.device) -> Tensor:
        there = {name: part.to(device) for name, part in parts.items()}
        return held.decode(there, rows * columns, columns, matrix.dtype)

    return unpack
