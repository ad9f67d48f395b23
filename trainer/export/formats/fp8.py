"""The merged model with its linear layers in FP8, a scale for each tile of 128 x 128, for vLLM, SGLang and transformers: half the
bytes of 16 bits."""

from typing import ClassVar

from trainer.base.base import Description
from trainer.config import Config
from trainer.config.section import Section
from trainer.export.figures import Proof
from trainer.export.outcome import ExportProgress, Written
from trainer.export.trained import check_mergeable_run, check_recodable
from trainer.store.store import Store


class Fp8Folder(Section):
    what: ClassVar[str] = "base and adapter, merged, in FP8"
    what_if_tuned: ClassVar[str] = "the whole model in FP8"
    whole_model: ClassVar[bool] = True

    def check(self, config: Config, base: Description) -> None:
        check_mergeable_run(config, base)
        check_recodable(base, "fp8")

    def write(self, folder: Store, destination: Store, step: int | None, progress: ExportProgress) -> Written:
        from trainer.export.write.codes import Fp8Blocks
        from trainer.export.write.recoded import export_recoded

        return export_recoded(folder, destination, step, lambda config: Fp8Blocks(), progress)

    def prove(self, folder: Store, step: int, destination: Store) -> Proof:
        from trainer.export.proof.recoded import prove_recoded

        return prove_recoded(folder, step, destination)


FORMATS = {"fp8": Fp8Folder}
