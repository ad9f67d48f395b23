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
    """The optimizer and the schedule of the learning rate."""

    name: Annotated[str, OneOf("trainer.state.optimizer", "OPTIMIZERS")] = setting(
        "adamw", about="The optimizer.", example="adamw_8bit"
    )
    lr: float = setting(2e-4, about="Peak learning rate.", example=2e-4, gt=0, le=1)
    schedule: Literal[
        "cosine", "linear", "constant", "cosine_with_restarts", "polynomial", "inverse_sqrt", "wsd", "one_cycle"
    ] = setting(
        "cosine",
        about=(
            "Course of the learning rate after the warm-up. cosine, linear, polynomial (see optim.power) and"
            " cosine_with_restarts (see optim.cycles) fall over all steps. wsd stays constant and falls over the last"
            " steps (see optim.decay_ratio). inverse_sqrt falls ever more slowly. constant does not fall. one_cycle"
            " rises along a cosine from lr / 25 to lr and falls to nearly 0."
        ),
        example="wsd",
    )
    warmup_steps: Steps = setting(0, about="Steps over which the learning rate rises from 0.", example=100)
    warmup_ratio: float | None = setting(
        None,
        about=(
            "Instead of warmup_steps: the length of the warm-up as a share of all steps. The number of steps is"
            " rounded up."
        ),
        example=0.03,
        gt=0,
        le=1,
        unit="share of steps",
    )
    warmup_power: Factor = setting(
        1.0, about="Shape of the rise in the warm-up: 1 is linear, 2 quadratic.", example=2.0
    )
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
        about="Final learning rate, as a share of lr. It has no meaning for constant, inverse_sqrt and one_cycle.",
        example=0.1,
        ge=0,
        le=1,
        unit="share of lr",
    )
    cycles: int = setting(
        1,
        about="cosine_with_restarts: how many times the learning rate falls, each time from lr.",
        example=3,
        ge=1,
        le=10_000,
        unit="cycles",
    )
    power: Factor = setting(1.0, about="polynomial: its exponent; 1 is linear.", example=2.0)
    decay_ratio: float = setting(
        0.1,
        about="wsd: the share of all steps, at the end, over which the learning rate falls along a cosine.",
        example=0.2,
        gt=0,
        le=1,
        unit="share of steps",
    )
    betas: tuple[float, float] = setting(
        (0.9, 0.999),
        about=(
            "adam, adamw, adamw_8bit, and muon for vectors: decay of the first and of the second moment. lion: the"
            " share of the momentum in the update, and the momentum's decay; the paper uses [0.9, 0.99]."
        ),
        example=[0.9, 0.95],
    )
    eps: float = setting(
        1e-8,
        about=(
            "adam, adamw, adamw_8bit, and muon for vectors: the number that is added to the root of the second moment."
        ),
        example=1e-8,
        gt=0,
    )
    momentum: float = setting(0.95, about="muon: decay of the momentum of matrices.", example=0.9, ge=0, lt=1)
    weight_decay: float = setting(
        0.0,
        about=(
            "Weight decay of the trained weights; with method full only of matrices. It is decoupled from the"
            " gradient, except for adam."
        ),
        example=0.01,
        ge=0,
    )
    lora_plus_ratio: Multiple = setting(
        1.0,
        about=(
            "Learning rate of the adapters' B matrices, as a multiple of lr (LoRA+). With 1, A and B have the same"
            " learning rate."
        ),
        example=16,
    )
    modules_ratio: Multiple = setting(
        1.0,
        about=(
            "Learning rate of the modules in tuning.modules_to_save, and of the projector with tuning.towers:"
            " projector, as a multiple of lr."
        ),
        example=0.1,
    )
    grad_clip: float = setting(
        1.0, about="Gradient clipping: the largest norm of the gradient. 0 turns clipping off.", example=1.0, ge=0
    )

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
    """Conditions that end a run before its last step. The run commits a checkpoint and counts as finished."""

    loss_above: float | None = setting(
        None,
        about="End the run when the training loss has been above this value for loss_steps steps in a row.",
        example=5.0,
        gt=0,
        unit="nats",
    )
    loss_steps: int = setting(
        3,
        about="Number of consecutive steps with a loss above loss_above that end the run.",
        example=10,
        ge=1,
        unit="steps",
    )
    no_better: int = setting(
        0,
        about=(
            "Early stopping: end the run after this number of consecutive evaluations without an improvement over the"
            " best one. 0 turns it off. Needs checkpoint.keep_best, which keeps the best checkpoint."
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

    steps: int | None = setting(
        None, about="Number of optimizer steps. Give this or epochs.", example=1000, ge=1, unit="steps"
    )
    epochs: float | None = setting(
        None,
        about="Number of passes over the training data; may be fractional. Give this or steps.",
        example=2.5,
        gt=0,
        le=10_000,
        unit="epochs",
    )
    global_batch: Rows = setting(
        8,
        about=(
            "Number of packed rows in an optimizer step, over all ranks. Capstan derives the gradient accumulation"
            " from it, so the loss curve does not change with the number of GPUs."
        ),
        example=64,
    )
    micro_batch: Rows = setting(1, about="Number of packed rows that a rank computes at once.", example=1)
    activation_checkpointing: bool | Literal["auto", "none", "all"] | int = setting(
        "auto",
        about=(
            "Which decoder layers recompute their activations in the backward pass. Recomputation saves memory, and"
            " such a layer takes half more time with adapters, a third more with method full. all (or true), none (or"
            " false), or a number N: all layers except the last N. auto: as few layers as the GPU's memory (on CPUs"
            " the host's memory) allows, by the plan. The results are equal to the last bit, unless tiled_mlp tiles"
            " the rows."
        ),
        example="all",
    )
    tiled_mlp: bool | Literal["auto"] = setting(
        "auto",
        about=(
            "Whether MLPs compute long rows in tiles of 4,096 tokens, which saves memory; each tile is recomputed in"
            " the backward pass. auto: rows of at least 16,384 tokens, in layers that recompute their activations"
            " anyway, where tiling costs no extra time."
        ),
        example=True,
    )
    activation_offload: bool = setting(
        False,
        about=(
            "Keep the inputs of layers that recompute their activations in pinned host memory. For rows so long that"
            " these inputs do not fit on the GPU."
        ),
        example=True,
    )
    products: Literal["plain", "fp8"] = setting(
        "plain",
        about=(
            "Number format of the matrix products of frozen linear layers. plain: model.dtype. fp8: both factors in"
            " FP8 with a scale for each row, and sums in fp32. fp8 needs a GPU of compute capability 8.9 to 11 (L40S,"
            " H100, B200), whose peak in FP8 is twice that in bf16; a base in 4 or 8 bits; and model.dtype bf16. Some"
            " products stay in model.dtype: those of trained weights and of the head; those of layers whose sizes are"
            " not multiples of 16; and those of experts, unless experts have at least 2,048 tokens on average and the"
            " GPU has compute capability 9.0 or 10.0."
        ),
        example="fp8",
    )
    deterministic: bool = setting(
        False,
        about=(
            "Make GPUs add in a fixed order. Then a run repeats to the last bit on the same GPUs, and is a few"
            " percent slower. By default some kernels, such as attention's backward pass, add in the order in which"
            " their parts end. The log names a kernel that has no fixed order. CPUs always have one."
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
    """How DeepSpeed divides the model over the ranks."""

    deepspeed: str = setting(
        "auto",
        about=(
            "A DeepSpeed policy: the name of a file in ds_configs, or the path of a file of your own. auto: zero3 on"
            " several GPUs, single_gpu on one GPU, cpu without a GPU."
        ),
        example="zero3",
    )
    scope: Literal["auto", "world", "node"] = setting(
        "auto",
        about=(
            "The ranks over which the frozen base is divided. world: all ranks. node: the ranks of one node, so that"
            " each node holds the whole base and no frozen weight crosses the network. auto: node if there are"
            " several nodes and their GPUs have enough memory, as `capstan plan --gpu` shows; otherwise world."
        ),
        example="node",
    )
    sequence_parallel: int = setting(
        1,
        about=(
            "Number of ranks that share each row. Each of these ranks has an equal slice of the row's tokens, and in"
            " attention, Mamba and linear attention a share of the heads (Ulysses). So the memory of activations"
            " falls by this factor. The number of ranks must be a multiple of it, and the ranks that share a row must"
            " be on one node. docs/long-rows.md has the conditions."
        ),
        example=4,
        ge=1,
        le=1024,
        unit="ranks",
    )
    tower_limit: float = setting(
        8.0,
        about=(
            "Largest tower (encoder and projector, docs/pictures.md) that each rank holds as a whole. If the base's"
            " tower is larger, the run computes the features of each picture once, before it loads the base, and keeps"
            " them in run.store. In training, ranks then need neither the pictures nor the tower. 0: store the features"
            " with any base, which saves time in runs of many epochs. docs/pictures.md has the conditions."
        ),
        example=0,
        ge=0,
        le=1024,
        unit="GiB",
    )
