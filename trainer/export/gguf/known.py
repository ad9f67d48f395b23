"""Whether llama.cpp's converter knows a base, as its own code says of config.json and the tokenizer's files."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
from gguf import LlamaFileType

from trainer.errors import ConfigError
from trainer.export.gguf.converter import NEWER, UNKNOWN_ARCHITECTURE, UNKNOWN_TOKENIZER, without_code
from trainer.store.scratch import scratch_folder
from trainer.store.tokenizer_files import TOKENIZER_FILES


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
