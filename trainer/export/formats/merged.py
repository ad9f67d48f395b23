"""Base and adapter as one model, in the types that the base is stored in."""

from typing import ClassVar

from trainer.base.base import Description
from trainer.config import Config
from trainer.config.section import Section
from trainer.export.figures import Proof
from trainer.export.format import WHOLE_MODEL, ExportProgress, Written
from trainer.export.trained import check_mergeable_run
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


FORMATS = {"merged": MergedFolder}
