"""The adapter alone, for llama.cpp.

llama.cpp loads it beside a GGUF file of the base: `llama-server -m BASE.gguf --lora FILE`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from trainer.base.base import Description
from trainer.base.find.locate import base_files, describe_base
from trainer.config import Config
from trainer.config.section import Section
from trainer.errors import ConfigError
from trainer.export.card import CardContent, model_card
from trainer.export.destination import CARD, TRAINED, ExportProgress, Written, check_destination
from trainer.export.figures import Proof
from trainer.export.gguf.converter import (
    PART,
    check_converter,
    check_known,
    check_loads_as_lora,
    deliver,
    has_converter,
)
from trainer.export.trained import check_base_at_hand, refuse_towers, trained_checkpoint
from trainer.store.scratch import scratch_folder
from trainer.store.store import Store
from trainer.tuning.head import head_of
from trainer.tuning.method import method_of

if TYPE_CHECKING:
    from trainer.export.write.foreseen import Foreseen


class GgufAdapter(Section):
    what: ClassVar[str] = "adapter in GGUF"
    what_if_tuned: ClassVar[str] = "adapter in GGUF"
    whole_model: ClassVar[bool] = False

    def check(self, config: Config, base: Description) -> None:
        method = method_of(config)
        if head_of(method) is not None:
            raise ConfigError(
                "--format gguf-adapter: llama.cpp has no place for the head of objective.name:"
                f" {config.objective.name}. Take --format peft."
            )
        refuse_towers(config, "gguf-adapter", "peft")
        if method.unmergeable:
            raise ConfigError(
                "--format gguf-adapter: llama.cpp loads LoRA adapters, and"
                f" {config.tuning.method} (tuning.method) makes others. Take --format peft."
            )
        if method.exports_model:
            raise ConfigError(
                "--format gguf-adapter: the base itself was tuned, so there is no adapter. Take --format gguf."
            )

    def check_files(self, run: "Foreseen") -> None:
        if (files := run.sample_adapter()) is None:
            return
        check_loads_as_lora(files)
        if has_converter():
            check_known(run.base.directory, tokenizer=False)

    def check_here(self) -> None:
        check_converter()

    def write(self, folder: Store, destination: Store, step: int | None, progress: ExportProgress) -> Written:
        from trainer.base.load.load import DTYPES
        from trainer.export.gguf.lora import write_gguf_lora
        from trainer.state.checkpoint.learnt_weights import LearntWeights

        manifest, config, method = trained_checkpoint(folder, step)
        name = f"{config.run.name}-adapter.gguf"
        self.check_here()
        self.check(config, describe_base(config.model))
        check_destination(destination, f"{name}{PART}")
        check_base_at_hand(config.model, manifest)
        weights = LearntWeights(folder, manifest, DTYPES[config.model.dtype])
        exported = method.export(weights.whole, config.model)
        what = f"{exported.what} in GGUF for llama.cpp, {TRAINED}."
        with scratch_folder("gguf") as scratch:
            file = Path(scratch, f"{name}{PART}")
            write_gguf_lora(exported.files, base_files(config.model), Path(scratch), file)
            content = CardContent("gguf", what, "adapter", f"llama-server -m BASE.gguf --lora {name}", "sh")
            destination.put(CARD, model_card(folder, config, manifest, content))
            deliver(file, destination, name)
        return Written(manifest, {"files": [name]})

    def prove(self, folder: Store, step: int, destination: Store) -> Proof:
        from trainer.export.gguf.proof import prove_gguf_adapter

        return prove_gguf_adapter(folder, step, destination)


FORMATS = {"gguf-adapter": GgufAdapter}
