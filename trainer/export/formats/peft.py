"""The adapter alone, as PEFT's `save_pretrained` writes it; the whole model where the base itself has learnt."""

from typing import ClassVar

from trainer.base.base import Description
from trainer.config import Config
from trainer.config.section import Section
from trainer.export.format import WHOLE_MODEL, Progress, Written
from trainer.export.proof import Proof
from trainer.store import Store


class PeftFolder(Section):
    what: ClassVar[str] = "adapter"
    what_if_tuned: ClassVar[str] = WHOLE_MODEL
    whole_model: ClassVar[bool] = False

    def check(self, config: Config, base: Description) -> None:
        pass

    def write(self, run: Store, destination: Store, step: int | None, progress: Progress) -> Written:
        from trainer.export.adapter import export_adapter

        return Written(export_adapter(run, destination, step, progress.written))

    def prove(self, run: Store, step: int, destination: Store) -> Proof:
        from trainer.export.verify import prove_adapter

        return prove_adapter(run, step, destination)


FORMATS = {"peft": PeftFolder}
