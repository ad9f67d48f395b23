"""Low-rank adapters (LoRA, arXiv:2106.09685, and DoRA, arXiv:2402.09353), and the settings that lora and rslora alone
read.
"""

from typing import Literal

from pydantic import model_validator

from trainer.config.section import Section, setting


class LoraSettings(Section):
    """The start of the adapters."""

    init: Literal["kaiming", "gaussian", "orthogonal"] = setting(
        "kaiming",
        about=(
            "The start of the two matrices, as PEFT's init_lora_weights. kaiming: A uniform, B zero. gaussian: A"
            " normal with a deviation of 1 / rank, B zero. orthogonal: both nonzero, with orthogonal rows, so that"
            " their product is zero; the rank must be even."
        ),
        example="orthogonal",
    )

    through: Literal["stored"] | None = setting(
        None,
        about=(
            "Compute by the codes that capstan export --format merged as=stored writes, over a base in 4 or 8 bits"
            " (quant.type: stored), so that what is trained is what is served. Default: the adapter is added to the"
            " output of the frozen layer."
        ),
        example="stored",
    )

    @model_validator(mode="after")
    def _start_once(self) -> "LoraSettings":
        if self.init != "kaiming" and getattr(self, "start", None):
            raise ValueError(
                f"tuning.init: {self.init} has no effect with tuning.start, from which learning begins. Remove one of"
                " them."
            )
        rank: int = getattr(self, "rank", 0)
        if self.init == "orthogonal" and rank % 2:
            raise ValueError(f"tuning.init: orthogonal needs an even rank, and tuning.rank is {rank}. Set another one.")
        return self


SETTINGS = (LoraSettings,)
