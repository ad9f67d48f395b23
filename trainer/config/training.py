"""The course of a training: its steps, its optimizer, and its division over the ranks."""

from typing import Annotated, Any, Literal

from pydantic import field_validator, model_validator

from trainer.config.registry import OneOf
from trainer.config.section import Factor, Multiple, Rows, Section, Steps, setting, with_parts

MLP_TILE = 4096
"""Tokens that a tiled MLP takes at a time."""
EXPERTS_AT_ONCE = 2**29
"""Bytes of a mixture's experts that are dequantized at a time, unless the plan has room for more."""
FP8_ROWS_EACH = 2048
"""Rows that an expert must have on average for products in FP8. Converting a weight reads and writes 9 bytes beside its
product, 3 ps on an H100. A row's product takes 3 fs, and half of that in FP8."""
FP8_AT_ONCE = 2**26
"""Numbers of experts that are converted to FP8 at a time."""
_LONG_ROW = 2**14 - 1


class Optim(Section):
    """The optimizer and its schedule."""

    name: Annotated[str, OneOf("trainer.state.optimizer", "OPTIMIZERS")] = setting(
        "adamw", about="The optimizer.", example="adamw_8bit"
    )
    lr: float = setting(2e-4, about="Peak learning rate.", example=2e-4, gt=0, le=1)
    schedule: Literal[
        "cosine", "linear", "constant", "cosine_with_restarts", "polynomial", "inverse_sqrt", "wsd", "one_cycle"
    ] = setting(
        "cosine",
        about=(
            "Course of the learning rate after warm-up. cosine, linear, polynomial (by optim.power) and"
            " cosine_with_restarts (by optim.cycles) fall over all steps, wsd over the last ones (optim.decay_ratio),"
            " inverse_sqrt falls ever more slowly, and constant stays. one_cycle rises along a cosine from a 25th of lr"
            " and falls to nearly nothing."
        ),
        example="wsd",
    )
    warmup_steps: Steps = setting(0, about="Steps over which the learning rate rises from 0.", example=100)
    warmup_ratio: float | None = setting(
        None,
        about="Instead of warmup_steps: the share of all steps over which the learning rate rises, rounded up.",
        example=0.03,
        gt=0,
        le=1,
        unit="share of steps",
    )
    warmup_power: Factor = setting(1.0, about="Exponent of the rise in warm-up: 1 is linear, 2 quadratic.", example=2.0)
    warmup_from: float = setting(
        0.0,
        about="Learning rate at which warm-up begins, as a share of lr.",
        example=0.1,
        ge=0,
        lt=1,
        unit="share of lr",
    )
    min_lr_ratio: float = setting(
        0.1,
        about="Last learning rate, as a share of lr. Not for constant, inverse_sqrt and one_cycle.",
        example=0.1,
        ge=0,
        le=1,
        unit="share of lr",
    )
    cycles: int = setting(
        1, about="Number of falls of cosine_with_restarts, each from lr.", example=3, ge=1, le=10_000, unit="cycles"
    )
    power: Factor = setting(1.0, about="Exponent of polynomial; 1 is linear.", example=2.0)
    decay_ratio: float = setting(
        0.1,
        about="Share of all steps at the end over which wsd falls, along a cosine.",
        example=0.2,
        gt=0,
        le=1,
        unit="share of steps",
    )
    betas: tuple[float, float] = setting(
        (0.9, 0.999),
        about=(
            "Decay of the first and second moment (adam, adamw, adamw_8bit; muon, of vectors). lion: share of the"
            " momentum in the update, and its decay, of which the paper has [0.9, 0.99]."
        ),
        example=[0.9, 0.95],
    )
    eps: float = setting(
        1e-8,
        about="Added to the root of the second moment (adam, adamw, adamw_8bit; muon, of vectors).",
        example=1e-8,
        gt=0,
    )
    momentum: float = setting(0.95, about="Decay of the momentum of matrices (muon).", example=0.9, ge=0, lt=1)
    weight_decay: float = setting(
        0.0,
        about="Weight decay of what learns, decoupled but for adam; with method full, of matrices only.",
        example=0.01,
        ge=0,
    )
    lora_plus_ratio: Multiple = setting(
        1.0,
        about="Learning rate of the adapters' B matrices, as a multiple of lr (LoRA+); 1 treats both matrices alike.",
        example=16,
    )
    modules_ratio: Multiple = setting(
        1.0,
        about=(
            "Learning rate of the modules that tuning.modules_to_save names, and of the projector with tuning.towers:"
            " projector, as a multiple of lr."
        ),
        example=0.1,
    )
    grad_clip: float = setting(1.0, about="Largest norm of the gradient. 0 turns clipping off.", example=1.0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> "Optim":
        for name, schedule in (("cycles", "cosine_with_restarts"), ("power", "polynomial"), ("decay_ratio", "wsd")):
            if self.schedule != schedule and getattr(self, name) != Optim.model_fields[name].default:
                raise ValueError(
                    f"optim.{name}: has no effect with optim.schedule: {self.schedule}. Remove it, or set"
                    f" optim.schedule: {schedule}."
                )
        if self.warmup_steps and self.warmup_ratio is not None:
            raise ValueError("optim.warmup_ratio and optim.warmup_steps: both given. Set one of them.")
        warms_up = self.schedule != "one_cycle" and bool(self.warmup_steps or self.warmup_ratio)
        unused = [name for name, none in (("warmup_power", 1), ("warmup_from", 0)) if getattr(self, name) != none]
        if unused and not warms_up:
            why = "with optim.schedule: one_cycle" if self.schedule == "one_cycle" else "without warm-up"
            raise ValueError(f"optim.{unused[0]}: has no effect {why}. Remove it.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                f"optim.betas: {list(self.betas)} is not allowed. Both must be in [0, 1). Example: [0.9, 0.95]."
            )
        return self


class StopWhen(Section):
    """When a run ends before its last step, with a checkpoint and as finished."""

    loss_above: float | None = setting(
        None,
        about="End the run when the training loss is above this in loss_steps steps in a row.",
        example=5.0,
        gt=0,
        unit="nats",
    )
    loss_steps: int = setting(
        3, about="Number of steps in a row with a loss above loss_above.", example=10, ge=1, unit="steps"
    )
    no_better: int = setting(
        0,
        about=(
            "End the run after this number of evaluations in a row that are no better than the best one. 0 turns"
            " it off. Needs checkpoint.keep_best, which keeps the best one."
        ),
        example=3,
        ge=0,
        unit="evaluations",
    )

    @model_validator(mode="after")
    def _used(self) -> "StopWhen":
        if self.loss_above is None and self.loss_steps != StopWhen.model_fields["loss_steps"].default:
            raise ValueError("train.stop_when.loss_steps: has no effect without loss_above. Set that, or remove it.")
        return self


@with_parts("trainer.train.every")
class Train(Section):
    """The length of the training and the size of its steps."""

    steps: int | None = setting(None, about="Optimizer steps. Give this or epochs.", example=1000, ge=1, unit="steps")
    epochs: float | None = setting(
        None,
        about="Passes over the training data; the last one may be partial. Give this or steps.",
        example=2.5,
        gt=0,
        le=10_000,
        unit="epochs",
    )
    global_batch: Rows = setting(
        8,
        about=(
            "Packed rows in one optimizer step, over all ranks. The accumulation is derived from it, so the loss curve"
            " does not change with the number of GPUs."
        ),
        example=64,
    )
    micro_batch: Rows = setting(1, about="Packed rows that a rank computes at once.", example=1)
    activation_checkpointing: bool | Literal["auto", "none", "all"] | int = setting(
        "auto",
        about=(
            "Which decoder layers compute their activations again in the backward pass. That frees their memory and"
            " takes half more time with adapters, a third with method full. all (or true), none (or false), or a number"
            " N: all except the last N. auto: as few as the memory of the GPU (on CPUs of the host) allows, by the"
            " plan. The result is the same to the last bit, unless tiled_mlp tiles such long rows."
        ),
        example="all",
    )
    tiled_mlp: bool | Literal["auto"] = setting(
        "auto",
        about=(
            "Whether MLPs compute long rows in tiles of 4,096 tokens, each again in the backward pass. auto: from"
            " 16,384 tokens on, in layers that are computed again anyway, where it takes no time."
        ),
        example=True,
    )
    activation_offload: bool = setting(
        False,
        about=(
            "Keep the inputs of layers that are computed again in pinned host memory, for rows so long that these"
            " alone do not fit on the GPU."
        ),
        example=True,
    )
    products: Literal["plain", "fp8"] = setting(
        "plain",
        about=(
            "How frozen linear layers multiply. plain: in model.dtype. fp8: both factors in eight-bit floats with a"
            " scale for each row and sums in fp32, on GPUs of compute capability 8.9 to 11 (L40S, H100, B200), whose"
            " peak is twice that of bf16. It needs a base in 4 or 8 bits and model.dtype bf16. What learns stays in"
            " model.dtype. The head and layers whose sizes are not multiples of 16 multiply plainly. So do experts with"
            " fewer than 2,048 rows on average, and on GPUs of another compute capability than 9.0 and 10.0."
        ),
        example="fp8",
    )
    deterministic: bool = setting(
        False,
        about=(
            "Make a GPU add in the same order every time. Attention's backward pass and other kernels otherwise add in"
            " the order in which their parts end. A run then repeats to the last bit on the same GPUs, and is a few"
            " percent slower. The log names a kernel that cannot do this. CPUs always do."
        ),
        example=True,
    )
    stop_when: StopWhen = StopWhen()

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _layers(cls, given: Any) -> str | int:
        if isinstance(given, bool):
            return "all" if given else "none"
        if given in ("auto", "all", "none") or (isinstance(given, int) and given >= 0):
            return given
        raise ValueError(
            f"train.activation_checkpointing: {given!r} is not allowed. Give auto, all, none, or a number of layers, at"
            " least 0."
        )

    @field_validator("tiled_mlp", mode="before")
    @classmethod
    def _tiles(cls, given: Any) -> bool | str:
        if given == "auto" or isinstance(given, bool):
            return given
        raise ValueError(f"train.tiled_mlp: {given!r} is not allowed. Give auto, true or false.")

    def kept_layers(self, layers: int) -> int:
        """Return how many of the last of `layers` decoder layers keep their activations. With auto it is none until
        `trainer.plan.plan.settled` has decided it."""
        given = self.activation_checkpointing
        return min(layers, given) if isinstance(given, int) else layers if given == "none" else 0

    def longest_mlp(self, *, recomputed: bool) -> int | None:
        """Return the most tokens that an MLP takes without tiles, in a layer that is `recomputed` or in another. None
        is any number.
        """
        if self.tiled_mlp == "auto":
            return _LONG_ROW if recomputed else None
        return MLP_TILE if self.tiled_mlp else None

    @model_validator(mode="after")
    def _consistent(self) -> "Train":
        if self.activation_offload and self.activation_checkpointing == "none":
            raise ValueError(
                "train.activation_offload: has no effect with train.activation_checkpointing: none, which computes no"
                " layer again. Remove one of them."
            )
        if (self.steps is None) == (self.epochs is None):
            given = "both" if self.steps else "neither"
            raise ValueError(
                f"train.steps and train.epochs: {given} given. Set exactly one of them. Example: train.steps: 1000."
            )
        return self


class Sharding(Section):
    """How DeepSpeed divides the model."""

    deepspeed: str = setting(
        "auto",
        about=(
            "A DeepSpeed policy: the name of a file in ds_configs, or the path of your own. auto is zero3 on several"
            " GPUs, single_gpu on one GPU, cpu without a GPU."
        ),
        example="zero3",
    )
    scope: Literal["auto", "world", "node"] = setting(
        "auto",
        about=(
            "Over which ranks the frozen base is divided. world: over all ranks. node: over those of one node, so each"
            " node holds a whole base and no frozen weight crosses the network. auto: node if there are several nodes"
            " whose GPUs have the memory, as `capstan plan --gpu` shows; otherwise world."
        ),
        example="node",
    )
    sequence_parallel: int = setting(
        1,
        about=(
            "Number of ranks that share each row. Each has an equal slice of its tokens, and in attention, Mamba and"
            " linear attention a share of its heads (Ulysses), so the memory of activations falls by this factor. The"
            " ranks of a run are a multiple of it, and those that share a row are on one node. docs/long-rows.md has"
            " the conditions."
        ),
        example=4,
        ge=1,
        le=1024,
        unit="ranks",
    )
    tower_limit: float = setting(
        8.0,
        about=(
            "The part of the base that sees is whole on each rank up to this size. If it is larger, the run computes"
            " what it makes of each picture once, before the base is loaded, and keeps these features in run.store."
            " Then no rank needs pictures or this part. 0 keeps the features with any base, which pays in runs of many"
            " epochs. docs/pictures.md has the conditions."
        ),
        example=0,
        ge=0,
        le=1024,
        unit="GiB",
    )
