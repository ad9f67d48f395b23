"""Bases in FP8, MXFP4 and 4 bits as their makers store them, and the weights that they stand for, by plain torch."""

import json
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.codes import FORMATS
from tests.nf4 import decoded
from trainer.store.safetensors_index import TensorSource, read_headers
from trainer.store.store import Store

# OCP Microscaling specification 1.0, table 5: the values of E2M1.
_FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def read_index(store: Store) -> dict[str, TensorSource]:
    """All tensors of a model directory; raises as `read_headers`."""
    return {name: tensor for header in read_headers(store).values() for name, tensor in header.tensors.items()}


def read_files(folder: Path) -> dict[str, Tensor]:
    """All tensors of a base."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def to_fp8(weight: Tensor, tile: tuple[int, int], scales: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A matrix as float8_e4m3, and the scales by which its tiles are multiplied; border tiles are cut off."""
    (rows, columns), (down, across) = weight.shape, tile
    count = -(-rows // down), -(-columns // across)
    padded = nn.functional.pad(weight.float(), (0, count[1] * across - columns, 0, count[0] * down - rows))
    tiles = padded.view(count[0], down, count[1], across)
    most = tiles.abs().amax((1, 3)) / 448
    # A power of two that is no smaller, where only these are possible.
    given = most.log2().ceil().exp2() if scales == torch.float8_e8m0fnu else most
    held = given.to(scales)
    stored = (tiles / held.float()[:, None, :, None]).view(count[0] * down, -1)[:rows, :columns]
    return stored.clamp(-448, 448).to(torch.float8_e4m3fn).contiguous(), held


def from_fp8(stored: Tensor, scales: Tensor, tile: tuple[int, int]) -> Tensor:
    """The bf16 weights that these stand for: every weight by the scale of its own tile."""
    rows, columns = stored.shape
    down, across = (torch.arange(size) // side for size, side in zip((rows, columns), tile, strict=True))
    return (stored.float() * scales.float().view(int(down[-1]) + 1, -1)[down][:, across]).bfloat16()


def random_mxfp4(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Blocks and scales of a stack (experts, inputs, outputs) of random weights."""
    experts, inputs, outputs = shape
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(119, 124, (experts, outputs, inputs // 32), dtype=torch.uint8)


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """The bf16 weights (experts, inputs, outputs) that these stand for."""
    found = []
    for block, scale in zip(blocks, scales, strict=True):
        halves = torch.stack([block & 15, block >> 4], dim=-1).flatten(-2)
        values = torch.tensor(_FP4)[halves.int()] * (2.0 ** (scale.double()[..., None] - 127)).float()
        found.append(values.flatten(-2).T.bfloat16())
    return torch.stack(found)


def store_in_fp8(
    plain: Path,
    folder: Path,
    tile: tuple[int, int] | None,
    scales: torch.dtype = torch.float32,
    beside: tuple[str, ...] = (),
    shard_size: str = "40KB",
) -> Path:
    """`plain` with its projections in FP8, in tiles or, where `tile` is None, with one scale each; in `folder` /
    "decoded" the same base in bf16. Each projection has tensors of the names `beside` too, which a training does
    without."""

    def change(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor] | None:
        if weight.ndim != 2 or "proj" not in name:
            return None
        of = tile or (weight.shape[0], weight.shape[1])
        # Rows and columns of very different sizes, so that no tile's scale is another's.
        spread = (
            weight.float() * torch.rand(weight.shape[0], 1).mul(4).exp2() * torch.rand(weight.shape[1]).mul(4).exp2()
        )
        values, by = to_fp8(spread / 4, of, scales)
        others = {f"{name.removesuffix('weight')}{other}": torch.ones(()) for other in beside}
        held = by if tile else by.reshape(())
        return {name: values, f"{name}_scale_inv": held, **others}, from_fp8(values, by, of)

    how = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": tile and list(tile),
        "activation_scheme": "dynamic",
    }
    return _store(plain, folder, how | {"modules_to_not_convert": ["lm_head"]}, change, shard_size)


def store_in_mxfp4(plain: Path, folder: Path, shard_size: str = "40KB") -> Path:
    """`plain`, a gpt-oss, with experts of random weights in MXFP4; in `folder` / "decoded" the same base in bf16."""

    def change(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor] | None:
        if weight.ndim != 3:
            return None
        blocks, scales = random_mxfp4((weight.shape[0], weight.shape[1], weight.shape[2]))
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}, from_mxfp4(blocks, scales)

    how = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return _store(plain, folder, how, change, shard_size)


def store_in_4_bits(plain: Path, folder: Path, *, double: bool, experts: bool = True) -> Path:
    """`plain` as bitsandbytes wrote it from transformers before its version 5, where every expert was a few linear
    layers: each quantized by itself, but those of a mixture where not `experts`; in `folder` / "decoded" the same base
    in bf16."""

    def change(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor] | None:
        expert = ".experts." in name
        if weight.ndim != 2 or not (experts if expert else "_proj" in name):
            return None
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
        beside = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        return {name: packed, **beside}, decoded(packed, state)

    how = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    return _store(plain, folder, how, change, "40KB")


def _store(plain: Path, folder: Path, how: dict[str, Any], change: Any, shard_size: str) -> Path:
    """A base with the tensors that `change` makes of those of `plain`, and `how` as its quantization_config."""
    torch.manual_seed(7)
    stored, plainly = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in read_files(plain).items():
        made = change(name, tensor) or ({name: tensor}, tensor)
        stored |= made[0]
        plainly[name] = made[1]
    for target, tensors in ((folder, stored), (folder / "decoded", plainly)):
        target.mkdir(parents=True)
        for file in plain.iterdir():
            if ".safetensors" not in file.name:
                shutil.copy(file, target)
        save_torch_state_dict(tensors, target, max_shard_size=shard_size)
    edit_config(folder, quantization_config=how)
    return folder


def edit_config(folder: Path, **values: Any) -> None:
    """Change keys of a base's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def store_as(plain: Path, folder: Path, name: str, *, only: str = "proj") -> Path:
    """`plain` with random weights in the format of this name (tests/codes.py) in the place of its projections; in
    `folder` / "decoded" the same base with the values that they stand for."""
    how, make = FORMATS[name]

    def change(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor] | None:
        if weight.ndim != 2 or only not in name:
            return None
        return make(name.removesuffix(".weight"), weight.shape[0], weight.shape[1])

    return _store(plain, folder, how, change, "40KB")
