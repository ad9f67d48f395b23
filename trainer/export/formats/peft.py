"""The adapter alone, as PEFT's `save_pretrained` writes it. If the base itself has learnt, it is the whole model."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trainer.base.base import Description
from trainer.config import Config, Model
from trainer.config.section import Section, setting
from trainer.errors import ConfigError
from trainer.export.destination import WHOLE_MODEL, ExportProgress, Written
from trainer.export.figures import Proof
from trainer.export.trained import check_mergeable_run
from trainer.servers import TOWERS_IGNORED, VLLM, adapter_refusals, remarks
from trainer.store.safetensors_index import read_header
from trainer.store.store import Store, read_json
from trainer.tuning.head import head_of
from trainer.tuning.linear_adapters import PEFT_SETTINGS, PEFT_WEIGHTS
from trainer.tuning.method import method_of

if TYPE_CHECKING:
    from trainer.export.write.foreseen import Foreseen


class PeftFolder(Section):
    what: ClassVar[str] = "adapter"
    what_if_tuned: ClassVar[str] = WHOLE_MODEL
    whole_model: ClassVar[bool] = False

    layout: Literal["peft", "vllm"] = setting(
        "peft",
        about=(
            "Layout of adapters of experts: PEFT's stacks, or each matrix by its own name, as vLLM and SGLang want it."
        ),
        example="vllm",
    )

    def check(self, config: Config, base: Description) -> None:
        if method_of(config).exports_model:
            check_mergeable_run(config, base)

    def check_files(self, run: "Foreseen") -> None:
        from trainer.export.write.adapter import as_peft_reads, for_whole_class

        method, model = method_of(run.config), run.config.model
        if method.exports_model:
            run.check_layout()
        elif self.layout == "peft" and (files := run.sample_adapter()):
            as_peft_reads(for_whole_class(files, model), model, head_of(method))

    def check_here(self) -> None:
        pass

    def write(self, folder: Store, destination: Store, step: int | None, progress: ExportProgress) -> Written:
        from trainer.export.write.adapter import export_adapter

        manifest = export_adapter(folder, destination, step, progress.written, self._arranged)
        if not (destination.exists(PEFT_SETTINGS) and destination.exists(PEFT_WEIGHTS)):
            return Written(manifest)  # the method is not one of PEFT's
        settings: dict[str, Any] = read_json(destination, PEFT_SETTINGS)
        found = adapter_refusals(settings, read_header(destination, PEFT_WEIGHTS, destination.head(PEFT_WEIGHTS).size))
        sees = manifest.adapter.get("towers") == "lora" and not found[VLLM]
        return Written(manifest, {"servers": found}, (*remarks(settings, found), *([TOWERS_IGNORED] if sees else [])))

    def _arranged(self, files: Mapping[str, bytes], model: Model) -> Mapping[str, bytes]:
        if self.layout == "peft" or PEFT_SETTINGS not in files:
            return files
        from trainer.export.write.adapter import per_expert_files

        return per_expert_files(files, model)

    def prove(self, folder: Store, step: int, destination: Store) -> Proof:
        from trainer.export.proof.verify import prove_adapter

        if self.layout != "peft":
            raise ConfigError("--verify: PEFT does not read layout=vllm. Verify the adapter in PEFT's own layout.")
        return prove_adapter(folder, step, destination)


FORMATS = {"peft": PeftFolder}
