"""The run's configuration: one tree of models, read from YAML, with dotted overrides (`train.steps=20`).

Every field has a unit (where it has one), a description and an example; `docs/configuration.md` is generated from them.
A setting that would be ignored is an error, an unknown key is refused with the nearest name.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from trainer.errors import ConfigError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _field(default: Any = ..., *, about: str, example: Any, unit: str | None = None, **constraints: Any) -> Any:
    extra: dict[str, Any] | None = {"unit": unit} if unit else None
    return Field(default, description=about, examples=[example], json_schema_extra=extra, **constraints)


class Run(Section):
    """Which run this is and where it lives."""

    name: str = _field(
        about="Name of the run: a folder of this name is made in the store. Letters, digits, '.', '_' and '-'.",
        example="llama-8b-support",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
    )
    store: str = _field(
        "runs",
        about="Where runs, compiled data and checkpoints are kept: a folder, or an s3://, gs:// or az:// URI.",
        example="s3://bucket/runs",
    )
    store_retry: float = _field(
        120,
        about="How long a request to a failing bucket is tried again, with growing pauses, before it counts as failed.",
        example=600,
        gt=0,
        unit="seconds",
    )
    store_timeout: float = _field(
        60,
        about="How long one request to a bucket may take; uploads go in parts of 32 MiB, four at a time.",
        example=300,
        gt=0,
        unit="seconds",
    )
    seed: int = _field(0, about="Decides the data order, the adapter's start and dropout.", example=7, ge=0, lt=2**32)


class Model(Section):
    """The base model that stays frozen."""

    base: str = _field(
        about="A Hugging Face model with safetensors files: a directory, an s3://, gs:// or az:// URI (read from there by "
        "ranges, without a local copy), or a Hub id (downloaded into Hugging Face's cache).",
        example="/models/Llama-3.1-8B",
    )
    revision: str | None = _field(None, about="Branch, tag or commit of a Hub id.", example="main")
    attention: Literal["auto", "flash_attention_2", "varlen", "sdpa", "eager"] = _field(
        "auto",
        about="Attention kernel. auto takes flash_attention_2 (the flash-attn package), else varlen (PyTorch's own), "
        "else sdpa, else eager (plain products, which hold all scores at once), whichever can run here and does what the base "
        "needs; the log says which and why.",
        example="sdpa",
    )
    dtype: Literal["bf16", "fp32"] = _field(
        "bf16", about="Type of activations and of everything that is not quantized.", example="bf16"
    )
    layers: int | None = _field(
        None,
        about="Use only the first layers of the base: for smoke runs of a large model.",
        example=2,
        ge=1,
        unit="layers",
    )


class Quant(Section):
    """How the frozen linear layers are stored."""

    type: Literal["nf4", "fp4", "none"] = _field("nf4", about="4-bit type, or none for 16-bit weights.", example="nf4")
    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] = _field(
        64, about="Weights that share one scale (absmax).", example=64, unit="weights"
    )
    double: bool = _field(False, about="Quantize the scales too, to 8 bits (saves 0.37 bits a weight).", example=True)

    cache: bool = _field(
        False,
        about="Keep the quantized base in the store (under bases/, half a byte a weight, shared by all runs) and read it "
        "from there next time: a quarter of the bytes, at any number of ranks. Every byte is checked against its hash.",
        example=True,
    )

    @model_validator(mode="after")
    def _scales(self) -> "Quant":
        if self.type == "none" and self.double:
            raise ValueError(
                "quant.double: true has no effect with quant.type: none. Remove it, or set quant.type: nf4."
            )
        if self.type == "none" and self.cache:
            raise ValueError(
                "quant.cache: true has no effect with quant.type: none. Remove it, or set quant.type: nf4."
            )
        return self


class Tuning(Section):
    """What learns: low-rank adapters on the frozen layers."""

    method: Literal["lora", "rslora"] = _field(
        "lora", about="lora scales by alpha / rank, rslora by alpha / sqrt(rank).", example="rslora"
    )
    rank: int = _field(16, about="Rank of the adapters.", example=16, ge=1, le=4096)
    alpha: float = _field(
        32.0, about="Scale of the adapters' output, before the division by the rank.", example=32, gt=0
    )
    dropout: float = _field(0.0, about="Share of the adapters' inputs dropped in training.", example=0.05, ge=0, lt=1)
    targets: Literal["all-linear"] | list[str] = _field(
        "all-linear",
        about="Which linear layers get an adapter: all-linear (all but the output head), or names.",
        example=["q_proj", "v_proj"],
    )


class Source(Section):
    """One place that documents come from."""

    path: str = _field(
        about="A file or a glob: .jsonl (also .gz, .zst), .parquet, .arrow or .mds; or the folder of a saved HF data set or of MDS "
        "shards. Local, or s3://, gs://, az://.",
        example="data/train-*.jsonl",
    )
    weight: float = _field(
        1.0,
        about="How often an epoch visits each document: 2 is twice, 0.5 a different half of them each epoch.",
        example=0.5,
        gt=0,
        le=1000,
        unit="visits an epoch",
    )
    fraction: float | None = _field(
        None,
        about="Instead of weight: the share of an epoch's tokens that comes from this source, such as general data mixed in "
        "so that the model keeps what it knew (replay).",
        example=0.1,
        gt=0,
        lt=1,
        unit="share of tokens",
    )

    @model_validator(mode="after")
    def _one_measure(self) -> "Source":
        if self.fraction is not None and self.weight != 1.0:
            raise ValueError("weight and fraction: both given. Set one of them.")
        return self


class Data(Section):
    """What is learnt from."""

    train: list[Source] = _field(about="Training sources.", example=[{"path": "data/train.jsonl"}], min_length=1)
    eval: list[Source] = _field(
        [], about="Sources that are evaluated but never trained on.", example=[{"path": "data/eval.jsonl"}]
    )
    held_out: float = _field(
        0.0,
        about="Share of the training rows that is evaluated instead of trained on, chosen by content, so that equal rows stay "
        "together. Instead of eval.",
        example=0.01,
        ge=0,
        lt=1,
        unit="share of rows",
    )
    held_out_seed: int = _field(0, about="Chooses other rows to hold out.", example=1, ge=0, lt=2**32)
    format: Literal["chat", "prompt_completion", "text"] = _field(
        "chat", about="chat: a list of messages; prompt_completion: two strings; text: one string.", example="chat"
    )
    fields: dict[str, str] = _field(
        {},
        about="Names of the fields in your rows, where they differ from messages, tools, prompt, completion and text.",
        example={"messages": "conversations"},
    )
    template: str | None = _field(
        None, about="A Jinja chat template file, instead of the tokenizer's own.", example="template.jinja"
    )
    loss_on: Literal["assistant", "last_assistant", "completion", "all"] | None = _field(
        None,
        about="Which tokens are trained. Default: assistant for chat, completion for prompt_completion, all for text.",
        example="last_assistant",
    )
    sequence_length: int = _field(2048, about="Length of a packed row.", example=8192, ge=8, le=2**20, unit="tokens")
    packing: bool = _field(True, about="Put several documents into one row; they never see each other.", example=True)
    on_too_long: Literal["truncate", "split", "drop", "fail"] = _field(
        "truncate",
        about="What happens to a document longer than sequence_length; it is counted either way. split makes documents of "
        "its pieces.",
        example="drop",
    )
    on_bad_row: Literal["fail", "skip"] = _field(
        "fail",
        about="What happens to a row that cannot be read: fail names file and line, skip counts it.",
        example="skip",
    )

    @model_validator(mode="after")
    def _targets(self) -> "Data":
        allowed = {
            "chat": ("assistant", "last_assistant", "all"),
            "prompt_completion": ("completion", "all"),
            "text": ("all",),
        }
        if self.loss_on and self.loss_on not in allowed[self.format]:
            raise ValueError(
                f"data.loss_on: {self.loss_on!r} does not exist in data.format: {self.format}. "
                f"Allowed there: {', '.join(allowed[self.format])}."
            )
        names = {"chat": ("messages", "tools"), "prompt_completion": ("prompt", "completion"), "text": ("text",)}[
            self.format
        ]
        for name in self.fields:
            if name not in names:
                raise ValueError(
                    f"data.fields: {name!r} is not a field of data.format: {self.format}. Allowed there: {', '.join(names)}."
                )
        return self

    @model_validator(mode="after")
    def _held_out(self) -> "Data":
        if self.held_out and self.eval:
            raise ValueError("data.held_out and data.eval: both given. Set one of them.")
        if self.held_out_seed and not self.held_out:
            raise ValueError("data.held_out_seed: has no effect without data.held_out. Set that, or remove it.")
        return self

    @model_validator(mode="after")
    def _fractions(self) -> "Data":
        fractions = [source.fraction for source in self.train if source.fraction is not None]
        if fractions and (len(fractions) == len(self.train) or sum(fractions) >= 1):
            raise ValueError(
                f"data.train: the fractions {', '.join(map(str, fractions))} leave nothing to the other sources. Their sum "
                "must be below 1, and one source needs a weight in place of a fraction."
            )
        for index, source in enumerate(self.eval):
            if source.weight != 1.0 or source.fraction is not None:
                raise ValueError(
                    f"data.eval[{index}]: weight and fraction have no effect, every document is evaluated once. Remove them."
                )
        return self

    @model_validator(mode="after")
    def _template(self) -> "Data":
        if self.template and self.format != "chat":
            raise ValueError(f"data.template: has no effect with data.format: {self.format}. Remove it.")
        return self

    @property
    def targets(self) -> str:
        """`loss_on`, or its default for the format."""
        return self.loss_on or {"chat": "assistant", "prompt_completion": "completion", "text": "all"}[self.format]


class Optim(Section):
    """AdamW and its schedule."""

    lr: float = _field(2e-4, about="Peak learning rate.", example=2e-4, gt=0, le=1)
    schedule: Literal["cosine", "linear", "constant"] = _field(
        "cosine", about="Course of the learning rate after warm-up.", example="cosine"
    )
    warmup_steps: int = _field(
        0, about="Steps over which the learning rate rises from 0.", example=100, ge=0, unit="steps"
    )
    min_lr_ratio: float = _field(
        0.1, about="Last learning rate, as a share of lr (cosine and linear).", example=0.1, ge=0, le=1
    )
    betas: tuple[float, float] = _field(
        (0.9, 0.999), about="Decay of the first and second moment.", example=[0.9, 0.95]
    )
    eps: float = _field(1e-8, about="Added to the root of the second moment.", example=1e-8, gt=0)
    weight_decay: float = _field(0.0, about="Decoupled weight decay of the adapters.", example=0.01, ge=0)
    lora_plus_ratio: float = _field(
        1.0,
        about="Learning rate of the adapters' B matrices, as a multiple of lr (LoRA+); 1 treats both matrices alike.",
        example=16,
        gt=0,
        le=1000,
    )
    grad_clip: float = _field(1.0, about="Largest norm of the gradient; 0 turns clipping off.", example=1.0, ge=0)

    @model_validator(mode="after")
    def _moments(self) -> "Optim":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                f"optim.betas: {list(self.betas)} is not allowed. Both must be in [0, 1). Example: [0.9, 0.95]."
            )
        return self


class Train(Section):
    """How long and in what portions."""

    steps: int | None = _field(None, about="Optimizer steps. Give this or epochs.", example=1000, ge=1, unit="steps")
    epochs: int | None = _field(
        None, about="Passes over the training data. Give this or steps.", example=3, ge=1, unit="epochs"
    )
    global_batch: int = _field(
        8,
        about="Packed rows in one optimizer step over all ranks. Accumulation is derived, so that the loss curve does not "
        "move with the number of GPUs.",
        example=64,
        ge=1,
        unit="rows",
    )
    micro_batch: int = _field(
        1, about="Packed rows a rank takes through the model at once.", example=1, ge=1, unit="rows"
    )
    activation_checkpointing: bool = _field(
        True, about="Recompute activations in the backward pass: less memory, about a third more time.", example=True
    )
    eval_every: int = _field(
        0, about="Evaluate every so many steps and at the end; 0 is only at the end.", example=100, ge=0, unit="steps"
    )

    @model_validator(mode="after")
    def _length(self) -> "Train":
        if (self.steps is None) == (self.epochs is None):
            given = "both" if self.steps else "neither"
            raise ValueError(
                f"train.steps and train.epochs: {given} given. Set exactly one of them. Example: train.steps: 1000."
            )
        return self


class Sharding(Section):
    """How DeepSpeed divides the model."""

    deepspeed: str = _field(
        "auto",
        about="A DeepSpeed policy: the name of a file in ds_configs, or the path of your own. auto is zero3 on several GPUs, single_gpu on one, cpu without.",
        example="zero3",
    )
    scope: Literal["auto", "world", "node"] = _field(
        "auto",
        about="Over which ranks the frozen base is divided: all of them, or those of one node (each node then holds a "
        "whole base and no frozen weight crosses the network). auto is node where there are several nodes and their GPUs "
        "have the memory, as `capstan plan --gpu-memory` tells; else world.",
        example="node",
    )


class Checkpoint(Section):
    """When training state is committed to the store."""

    every_steps: int = _field(
        100, about="Commit every so many steps; 0 turns this rule off.", example=100, ge=0, unit="steps"
    )
    every_minutes: float = _field(
        30,
        about="Commit when so long has passed since the last; 0 turns this rule off.",
        example=15,
        ge=0,
        unit="minutes",
    )
    keep_last: int = _field(3, about="Newest checkpoints to keep.", example=3, ge=1, unit="checkpoints")
    keep_every: int = _field(
        0,
        about="Also keep every checkpoint whose step is a multiple of this; 0 keeps none.",
        example=1000,
        ge=0,
        unit="steps",
    )
    keep_best: int = _field(
        0,
        about="Also keep so many checkpoints with the lowest evaluation loss, and commit after every evaluation; 0 keeps "
        "none.",
        example=2,
        ge=0,
        unit="checkpoints",
    )
    when_busy: Literal["wait", "skip"] = _field(
        "wait",
        about="What a save does that is due while the one before is still being uploaded: wait for it, or be skipped. "
        "The metrics say how long and how often.",
        example="skip",
    )
    failed_saves: int = _field(
        3,
        about="Saves that may fail one after the other before the run ends with exit code 6. The first and the last save "
        "of a start may not fail at all.",
        example=0,
        ge=0,
        unit="saves",
    )


class Ray(Section):
    """The Ray cluster that runs the workers."""

    address: str | None = _field(
        None, about="A running cluster. Without it Ray starts on this machine for this run.", example="auto"
    )
    start_timeout: float = _field(
        300, about="How long to wait for the workers that were asked for.", example=600, gt=0, unit="seconds"
    )
    resize_interval: float = _field(
        60,
        about="How often a run with cluster.workers: [fewest, most] looks for room for more ranks.",
        example=300,
        gt=0,
        unit="seconds",
    )
    cpus_per_worker: float = _field(1, about="CPUs that Ray books for each rank.", example=8, gt=0, unit="CPUs")
    memory_per_worker: float | None = _field(
        None, about="Host memory that Ray books for each rank. Default: none is booked.", example=64, gt=0, unit="GiB"
    )
    resources: dict[str, float] = _field(
        {}, about="Custom resources that Ray books for each rank.", example={"accelerator_type:H100": 0.01}
    )
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = _field(
        "PACK",
        about="How Ray lays the ranks out over machines: PACK fills one after the other, SPREAD takes as many as there are; "
        "STRICT refuses anything else.",
        example="SPREAD",
    )
    runtime_env: dict[str, Any] = _field(
        {},
        about="Ray's runtime environment for `capstan submit ray`: env_vars, pip, image_uri and so on. The code of the "
        "snapshot is its working_dir.",
        example={"env_vars": {"NCCL_SOCKET_IFNAME": "eth0"}},
    )

    @model_validator(mode="after")
    def _own_working_dir(self) -> "Ray":
        if "working_dir" in self.runtime_env:
            raise ValueError(
                "cluster.ray.runtime_env: working_dir is the snapshot of your checkout and cannot be set. Remove it."
            )
        return self


class Slurm(Section):
    """The job that `capstan submit slurm` makes: its resources, and how it goes on after a time limit or a lost node."""

    nodes: int = _field(1, about="Machines.", example=2, ge=1, unit="nodes")
    gpus_per_node: int | None = _field(
        None, about="GPUs of each node. Default: none, the ranks run on CPUs.", example=8, ge=1, unit="GPUs"
    )
    gpu_type: str | None = _field(None, about="Which GPUs, by Slurm's name for them.", example="h100")
    cpus_per_node: int | None = _field(
        None,
        about="CPUs of each node. Default: cluster.threads_per_worker for each of its ranks, or one.",
        example=96,
        ge=1,
        unit="CPUs",
    )
    memory_per_node: str | None = _field(
        None,
        about="Memory of each node, in Slurm's notation; 0 is all of it. Default: the partition's.",
        example="900G",
        pattern=r"^\d+[KMGT]?$",
    )
    partition: str | None = _field(None, about="Partition, or several with commas.", example="gpu")
    account: str | None = _field(None, about="Account that is charged.", example="nlp")
    qos: str | None = _field(None, about="Quality of service.", example="high")
    time: str | None = _field(
        None,
        about="Time limit of one job, after which the run goes on in the next. Default: the partition's.",
        example="24:00:00",
        pattern=r"^(\d+-)?\d+(:\d+){0,2}$",
        unit="[days-]hours:minutes:seconds",
    )
    constraint: str | None = _field(None, about="Features that nodes must have.", example="ib&h100")
    exclude: str | None = _field(None, about="Nodes not to use.", example="n[7,12]")
    comment: str | None = _field(None, about="A comment, as Slurm records it.", example="second try")
    extra: list[str] = _field([], about="More options of sbatch, one each.", example=["--reservation=team"])
    setup: list[str] = _field(
        [],
        about="Shell lines that run first in the job, such as loading modules.",
        example=["module load cuda/12.8"],
    )
    container: list[str] = _field(
        [],
        about="Words put before each Python command on the nodes.",
        example=["apptainer", "exec", "--nv", "/images/capstan.sif"],
    )
    python: str | None = _field(
        None, about="Python on the nodes. Default: the one that submits.", example="/opt/capstan/bin/python"
    )
    local_dir: str = _field(
        "/tmp", about="A folder on each node's own disk, for Ray's session.", example="/local/scratch"
    )
    output: str | None = _field(
        None,
        about="Folder of the job's output file. Default: the run's folder where the store is one, else the current folder.",
        example="/home/me/logs",
    )
    launch: Literal["ray", "direct"] = _field(
        "ray",
        about="ray starts Ray on the nodes; direct starts the ranks with srun, and nothing restarts them inside a job.",
        example="direct",
    )
    signal_seconds: int = _field(
        300,
        about="How long before the time limit the run commits and stops. A commit and the end must fit in.",
        example=600,
        ge=30,
        le=65535,
        unit="seconds",
    )
    chain: int = _field(
        0,
        about="Where jobs must not be requeued: how many jobs to submit that follow each other. 0 is one that requeues itself.",
        example=4,
        ge=0,
        le=100,
        unit="jobs",
    )

    @model_validator(mode="after")
    def _one_line_each(self) -> "Slurm":
        for name, given in self:
            for value in given if isinstance(given, list) else [given]:
                if isinstance(value, str) and (not value.strip() or not value.isprintable()):
                    raise ValueError(
                        f"cluster.slurm.{name}: {value!r} is not allowed. It is one line of printable text, and not empty."
                    )
        for option in self.extra:
            if not re.match(r"^-(-[a-z][a-z-]*|[A-Za-z])(=|$)", option):
                raise ValueError(
                    f"cluster.slurm.extra: {option!r} is not allowed. Give each option as --name=value or --name."
                )
        if self.gpu_type and not self.gpus_per_node:
            raise ValueError("cluster.slurm.gpu_type: has no effect without cluster.slurm.gpus_per_node. Set that too.")
        return self


class Cluster(Section):
    """How many ranks, and on what."""

    workers: int | tuple[int, int] | None = _field(
        None,
        about="Ranks, or [fewest, most] for a run that goes on with fewer when machines leave the Ray cluster and grows when "
        "they come. Default: one for each GPU of the cluster, one without GPUs.",
        example=[8, 32],
        unit="ranks",
    )
    gpus_per_worker: Literal[0, 1] | None = _field(
        None, about="GPUs of each rank. Default: 1 where there are GPUs, else 0.", example=1, unit="GPUs"
    )
    threads_per_worker: int | None = _field(
        None,
        about="CPU threads of each rank (OMP_NUM_THREADS). Default: the machine's cores divided by its ranks.",
        example=8,
        ge=1,
        unit="threads",
    )
    ray: Ray = Ray()
    slurm: Slurm = Slurm()

    @model_validator(mode="before")
    @classmethod
    def _range(cls, given: Any) -> Any:
        """Before pydantic's own checks: they would report each branch of the union."""
        workers = given.get("workers") if isinstance(given, dict) else None
        bounds: list[Any] = list(workers) if isinstance(workers, list | tuple) else [workers, workers]
        whole = all(isinstance(bound, int) and not isinstance(bound, bool) for bound in bounds)
        if workers is not None and not (whole and len(bounds) == 2 and 1 <= bounds[0] <= bounds[1]):
            raise ValueError(
                f"cluster.workers: {workers!r} is not allowed. Give a whole number from 1, or [fewest, most] with "
                "1 <= fewest <= most. Example: [8, 32]."
            )
        return given

    @property
    def fewest_workers(self) -> int | None:
        """Ranks that the run needs at least; None where the cluster decides."""
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def most_workers(self) -> int | None:
        """Ranks that the run takes at most; None where the cluster decides."""
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers


class Retry(Section):
    """How often a run starts again by itself."""

    failures: int = _field(
        3,
        about="Restarts after a crash before the run gives up. Configuration and data errors are never retried, and a second "
        "crash at the same step ends the run.",
        example=3,
        ge=0,
        unit="restarts",
    )
    preemptions: int | None = _field(
        None,
        about="Restarts after a machine was taken away or lost, counted apart from crashes. Default: any number.",
        example=20,
        ge=0,
        unit="restarts",
    )
    skip_bad_window: bool = _field(
        True,
        about="After a loss that is not finite: go back to the last commit and leave that step's rows out, once. Without it, "
        "or the second time, the run ends with exit code 5.",
        example=False,
    )


class Timeouts(Section):
    """How long a rank may take over one thing before it counts as hanging, is named, and the ranks start again."""

    load: float = _field(
        3600, about="For loading the model and restoring its checkpoint.", example=1800, gt=0, unit="seconds"
    )
    step: float = _field(
        900, about="For one step, or one step's data, or one evaluation.", example=300, gt=0, unit="seconds"
    )
    save: float = _field(3600, about="For waiting until a checkpoint is committed.", example=900, gt=0, unit="seconds")


class Track(Section):
    """Where metrics go, besides the run's folder."""

    tensorboard: bool = _field(True, about="Write TensorBoard events into the run's folder.", example=True)
    flush_seconds: float = _field(
        5.0, about="How often metrics and logs are written to the store.", example=10, gt=0, unit="seconds"
    )


class Config(Section):
    """A whole run."""

    run: Run
    model: Model
    quant: Quant = Quant()
    tuning: Tuning = Tuning()
    data: Data
    optim: Optim = Optim()
    train: Train
    sharding: Sharding = Sharding()
    checkpoint: Checkpoint = Checkpoint()
    cluster: Cluster = Cluster()
    retry: Retry = Retry()
    timeouts: Timeouts = Timeouts()
    track: Track = Track()

    @model_validator(mode="after")
    def _used(self) -> "Config":
        if self.train.eval_every and not (self.data.eval or self.data.held_out):
            raise ValueError(
                "train.eval_every: has no effect without data.eval or data.held_out. Set one of them, or set it to 0."
            )
        if self.tuning.targets == []:
            raise ValueError("tuning.targets: [] leaves nothing to learn. Name layers, or set all-linear.")
        if self.checkpoint.keep_best and not (self.data.eval and self.train.eval_every):
            raise ValueError(
                "checkpoint.keep_best: has no effect without data.eval and train.eval_every. Set both, or set it to 0."
            )
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key.path=value` overrides (values are YAML), and validate.

    Raises:
        ConfigError: the file is missing or not YAML, or a setting is unknown, missing or wrong. All are named at once.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration {str(path)!r} cannot be read: {error}.") from error
    return parse_config(text, overrides, name=str(path))


def parse_config(text: str, overrides: Sequence[str] = (), name: str = "config") -> Config:
    """Like `load_config`, from the YAML text itself."""
    tree = _yaml(text, name)
    if not isinstance(tree, dict):
        raise ConfigError(f"{name} is not a configuration: its top level must be sections such as 'run:' and 'model:'.")
    for override in overrides:
        _apply(tree, override)
    unknown = list(_unknown_keys(tree, Config, ""))
    if unknown:
        raise ConfigError("\n".join(unknown))
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error.errors()))) from error


def dump_config(config: Config) -> str:
    """The YAML text of `config`, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def override(config: Config, *overrides: str) -> Config:
    """A copy of `config` with dotted overrides applied and validated again."""
    return parse_config(dump_config(config), overrides)


def _yaml(text: str, name: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{name}{where} is not YAML: {getattr(error, 'problem', error)}.") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key=value. Example: train.steps=20.")
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section.")
        node = child
    node[leaf] = _yaml(value, f"override {override!r}")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _unknown_keys(tree: Any, model: type[BaseModel], prefix: str) -> Iterator[str]:
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        field = model.model_fields.get(key)
        if field is None:
            close = difflib.get_close_matches(str(key), model.model_fields, n=1, cutoff=0.5) or _elsewhere(str(key))
            hint = f"Did you mean {close[0]!r}?" if close else f"Allowed here: {', '.join(model.model_fields)}."
            yield f"{prefix}{key}: unknown setting. {hint}"
            continue
        for child in _models_in(field.annotation):
            items = value if isinstance(value, list) else [value]
            for index, item in enumerate(items):
                yield from _unknown_keys(
                    item, child, f"{prefix}{key}[{index}]." if isinstance(value, list) else f"{prefix}{key}."
                )


def _elsewhere(key: str) -> list[str]:
    """Where in the tree a key of this very name lives, for settings put into the wrong section."""
    return [path for path, _ in fields() if path.rpartition(".")[2] == key]


def fields(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting, depth first, as (dotted name, field)."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from fields(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


# What is to be written in YAML, where pydantic speaks of Python's types: error type -> words.
_EXPECTED = {
    "model_type": "Input should be a section of settings",
    "dict_type": "Input should be a section of names and values",
    "list_type": "Input should be a list",
    "string_type": "Input should be text",
}


def _explain(errors: Sequence[Any]) -> Iterator[str]:
    """One sentence for each wrong setting: its name, the value, what is allowed, an example.

    pydantic reports every branch of a union under a tag such as `list[str]`: the branch that got deepest is the one that
    was meant, and branches that got equally far are alternatives.
    """
    unions: dict[tuple[Any, ...], list[Any]] = {}
    for item in errors:
        location = item["loc"]
        tag = next((i for i, part in enumerate(location) if _is_union_tag(part)), len(location))
        unions.setdefault(location[:tag], []).append(item)
    for items in unions.values():
        depth = max(len(item["loc"]) for item in items)
        settings: dict[tuple[Any, ...], list[Any]] = {}
        for item in items:
            if len(item["loc"]) == depth:
                settings.setdefault(tuple(part for part in item["loc"] if not _is_union_tag(part)), []).append(item)
        yield from (_sentence(path, same) for path, same in settings.items())


def _sentence(path: tuple[Any, ...], errors: Sequence[Any]) -> str:
    first = errors[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    field = _field_at([part for part in path if not isinstance(part, int)])
    example = ""
    if field is not None and field.examples:
        example = f" Example: {yaml.safe_dump(field.examples[0], default_flow_style=True).strip().removesuffix('...').strip()}."
    if first["type"] == "missing":
        return f"{name}: missing, and it has no default.{example}"
    messages = [_EXPECTED.get(item["type"]) or str(item["msg"]).removesuffix(".") for item in errors]
    allowed = " or ".join([messages[0], *(message.removeprefix("Input should be ") for message in messages[1:])])
    return f"{name}: {first['input']!r} is not allowed. {allowed}.{example}"


def _is_union_tag(part: Any) -> bool:
    """pydantic adds the branch of a union to a location, such as `literal['all-linear']` or `list[str]`."""
    return isinstance(part, str) and "[" in part


def _field_at(path: list[Any]) -> FieldInfo | None:
    model: type[BaseModel] = Config
    field = None
    for part in path:
        field = model.model_fields.get(part)
        if field is None:
            return None
        model = next(_models_in(field.annotation), Section)
    return field
