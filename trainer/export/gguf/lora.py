"""A LoRA adapter in the form that llama.cpp loads beside its base (`--lora`).

It is a GGUF file with `lora_a` and `lora_b` of each matrix.

llama.cpp's converter moves rows of some matrices (those of Llama's q_proj and k_proj, for its rotary positions) and
cuts others in two. An adapter B @ A must follow. So the converter's own code runs on a matrix of row numbers. The
result shows which rows of the model each matrix of the GGUF file has. B gets these rows, and A stays as it is. A matrix
of column numbers must come out unchanged; otherwise no adapter can follow.

The file's keys are those of llama.cpp's src/llama-adapter.cpp. It multiplies B @ A by alpha / rank, where the rank is
A's.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gguf import MODEL_ARCH_NAMES, GGUFType, GGUFWriter, Keys
from safetensors.torch import load
from torch import Tensor

from trainer.errors import ConfigError
from trainer.export.gguf.converter import DOWN, INSTEAD, UP, check_loads_as_lora, converters_model
from trainer.tuning.linear_adapters import PEFT_SETTINGS, PEFT_WEIGHTS, PREFIX

_LAYER = re.compile(r"\.(\d+)\.")


class _Placed(NamedTuple):
    """A matrix of the GGUF file, and the rows of the model's matrix that it has."""

    name: str
    rows: Tensor


def write_gguf_lora(files: Mapping[str, bytes], base: Path, scratch: Path, file: Path) -> None:
    """Write an adapter, given as PEFT's `files`, to `file`.

    The base is in the folder `base`; only its config.json is read.

    Raises:
        ConfigError: the adapter has something that llama.cpp's adapters lack, or the converter does not know the base.
    """
    check_loads_as_lora(files)
    settings = json.loads(files[PEFT_SETTINGS])
    weights = load(files[PEFT_WEIGHTS])
    model = converters_model(base, scratch)
    writer = GGUFWriter(file, MODEL_ARCH_NAMES[model.model_arch])
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    # llama.cpp always divides by the rank, even if PEFT divides by its root.
    alpha = float(settings["lora_alpha"]) * (settings["r"] ** 0.5 if settings.get("use_rslora") else 1)
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    for name, down in sorted(weights.items()):
        if not name.endswith(DOWN):
            continue
        matrix, up = name.removesuffix(DOWN), weights[name.removesuffix(DOWN) + UP]
        for part in _parts(model, f"{matrix.removeprefix(PREFIX)}.weight", up.shape[0], down.shape[1]):
            writer.add_tensor(f"{part.name}.lora_a", down.float().numpy())
            writer.add_tensor(f"{part.name}.lora_b", up[part.rows].float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _parts(model: Any, name: str, rows: int, columns: int) -> Iterator[_Placed]:
    numbers = torch.arange(rows, dtype=torch.float32)[:, None].expand(rows, columns)
    across = torch.arange(columns, dtype=torch.float32)
    found = _converted(model, name, numbers)
    same = _converted(model, name, across.expand(rows, columns))
    for (place, values), (_, kept) in zip(found, same, strict=True):
        whole = values.shape[-1] == columns and values.ndim == 2 and bool((values == values[:, :1]).all())
        if not whole or not bool((kept == across).all()):
            raise ConfigError(
                f"--format gguf-adapter: llama.cpp has {name} in another layout, which no adapter can follow. {INSTEAD}"
            )
        yield _Placed(place, values[:, 0].long())


def _converted(model: Any, name: str, values: Tensor) -> list[tuple[str, Tensor]]:
    layer = _LAYER.search(name)
    kept = model.filter_tensors((name, lambda: values))
    if kept is None:
        raise ConfigError(f"--format gguf-adapter: llama.cpp's model of this base has no {name}. {INSTEAD}")
    try:
        return list(model.modify_tensors(kept[1](), kept[0], int(layer[1]) if layer else None))
    except (ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(
            f"--format gguf-adapter: llama.cpp's converter cannot place {name}: {error}. {INSTEAD}"
        ) from error
