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
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
from gguf import MODEL_ARCH_NAMES, GGUFType, GGUFWriter, Keys, LlamaFileType
from safetensors.torch import load
from torch import Tensor

from trainer.errors import ConfigError
from trainer.store.tokenizer_files import TOKENIZER_FILES
from trainer.tuning.shared.linear_adapters import PREFIX, SETTINGS, WEIGHTS

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_LAYER = re.compile(r"\.(\d+)\.")
_INSTEAD = "Export the merged model: --format gguf."


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
    settings = json.loads(files[SETTINGS])
    weights = load(files[WEIGHTS])
    _check(settings, weights)
    model = _converter(base, scratch)
    writer = GGUFWriter(file, MODEL_ARCH_NAMES[model.model_arch])
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    # llama.cpp always divides by the rank, even if PEFT divides by its root.
    alpha = float(settings["lora_alpha"]) * (settings["r"] ** 0.5 if settings.get("use_rslora") else 1)
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    for name, down in sorted(weights.items()):
        if not name.endswith(_DOWN):
            continue
        matrix, up = name.removesuffix(_DOWN), weights[name.removesuffix(_DOWN) + _UP]
        for part in _parts(model, f"{matrix.removeprefix(PREFIX)}.weight", up.shape[0], down.shape[1]):
            writer.add_tensor(f"{part.name}.lora_a", down.float().numpy())
            writer.add_tensor(f"{part.name}.lora_b", up[part.rows].float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    if settings["peft_type"] != "LORA" or settings.get("use_dora"):
        kind = "DoRA" if settings.get("use_dora") else settings["peft_type"]
        raise ConfigError(f"--format gguf-adapter: llama.cpp loads LoRA adapters, and this is {kind}. {_INSTEAD}")
    other = next((name for name in sorted(weights) if not name.endswith((_DOWN, _UP))), None)
    if other is not None or settings.get("target_parameters"):
        what = (other or f"{settings['target_parameters'][0]}").removeprefix(PREFIX)
        raise ConfigError(
            f"--format gguf-adapter: llama.cpp's adapters are of single matrices, and this has {what}. {_INSTEAD}"
        )


def _converter(base: Path, scratch: Path) -> Any:
    """Return the converter's model of the base without weights. It would look for weights beside config.json."""
    for name in ("config.json", *TOKENIZER_FILES):
        if (base / name).exists():
            shutil.copy(base / name, scratch / name)
    settings = ModelBase.load_hparams(scratch, False)
    try:
        architecture = get_model_class(get_model_architecture(settings, ModelType.TEXT))
    except NotImplementedError as error:
        raise ConfigError(f"llama.cpp's converter does not know this base's architecture: {error}") from error
    return architecture(scratch, LlamaFileType.ALL_F32, scratch / "none.gguf", hparams=settings)


def _parts(model: Any, name: str, rows: int, columns: int) -> Iterator[_Placed]:
    numbers = torch.arange(rows, dtype=torch.float32)[:, None].expand(rows, columns)
    across = torch.arange(columns, dtype=torch.float32)
    found = _converted(model, name, numbers)
    same = _converted(model, name, across.expand(rows, columns))
    for (place, values), (_, kept) in zip(found, same, strict=True):
        whole = values.shape[-1] == columns and values.ndim == 2 and bool((values == values[:, :1]).all())
        if not whole or not bool((kept == across).all()):
            raise ConfigError(
                f"--format gguf-adapter: llama.cpp has {name} in another layout, which no adapter can follow."
                f" {_INSTEAD}"
            )
        yield _Placed(place, values[:, 0].long())


def _converted(model: Any, name: str, values: Tensor) -> list[tuple[str, Tensor]]:
    layer = _LAYER.search(name)
    kept = model.filter_tensors((name, lambda: values))
    if kept is None:
        raise ConfigError(f"--format gguf-adapter: llama.cpp's model of this base has no {name}. {_INSTEAD}")
    try:
        return list(model.modify_tensors(kept[1](), kept[0], int(layer[1]) if layer else None))
    except (ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(
            f"--format gguf-adapter: llama.cpp's converter cannot place {name}: {error}. {_INSTEAD}"
        ) from error
