"""Base and adapter as one model, in the types that the base is stored in, or with its linear layers in fewer bits: FP8
has half the bytes of 16 bits, nf4 a fourth.

A run over a base in nf4 learnt an adapter for those 4 bits; here the sum of the stored base and the adapter is rounded
to 4 bits, which is another rounding. The weights' error is said, and --verify measures how far the predictions are.
"""

from typing import ClassVar, Literal

from trainer.base.base import Description
from trainer.config import Config
from trainer.config.section import Section, setting
from trainer.export.figures import Proof
from trainer.export.format import WHOLE_MODEL, ExportProgress, Written
from trainer.export.trained import check_mergeable_run, check_recodable
from trainer.store.store import Store


class MergedFolder(Section):
    what: ClassVar[str] = "base and adapter, merged,"
    what_if_tuned: ClassVar[str] = WHOLE_MODEL
    whole_model: ClassVar[bool] = True

    def check(self, config: Config, base: Description) -> None:
        check_mergeable_run(config, base)

    def write(self, folder: Store, destination: Store, step: int | None, progress: ExportProgress) -> Written:
        from trainer.export.write.merged import export_merged

        return Written(export_merged(folder, destination, step, progress.written))

    def prove(self, folder: Store, step: int, destination: Store) -> Proof:
        from trainer.export.proof.verify import prove_merged

        return prove_merged(folder, step, destination)


class Fp8Folder(Section):
    """A scale for each tile of 128 x 128, for vLLM, SGLang and transformers."""

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


class Nf4Folder(Section):
    """As transformers and bitsandbytes load it."""

    what: ClassVar[str] = "base and adapter, merged, in nf4"
    what_if_tuned: ClassVar[str] = "the whole model in nf4"
    whole_model: ClassVar[bool] = True

    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] | None = setting(
        None, about="Weights that share a scale. Default: the run's quant.block_size.", example=64
    )
    double: bool | None = setting(
        None, about="Whether scales are quantized too. Default: the run's quant.double.", example=True
    )

    def check(self, config: Config, base: Description) -> None:
        check_mergeable_run(config, base)
        check_recodable(base, "nf4")

    def write(self, folder: Store, destination: Store, step: int | None, progress: ExportProgress) -> Written:
        from trainer.base.load.load import DTYPES
        from trainer.export.write.codes import BitsAndBytes
        from trainer.export.write.recoded import export_recoded
        from trainer.model.nf4 import Format

        def code(config: Config) -> BitsAndBytes:
            block_size, double = self.block_size or config.quant.block_size, self.double
            double = config.quant.double if double is None else double
            return BitsAndBytes(Format("nf4", block_size, double, DTYPES[config.model.dtype]))

        return export_recoded(folder, destination, step, code, progress)

    def prove(self, folder: Store, step: int, destination: Store) -> Proof:
        from trainer.export.proof.recoded import prove_recoded

        return prove_recoded(folder, step, destination)


FORMATS = {"merged": MergedFolder, "fp8": Fp8Folder, "nf4": Nf4Folder}
