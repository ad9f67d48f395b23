"""The machines: how many ranks, and what Ray and Slurm are asked for."""

import re
from typing import Any, Literal

from pydantic import field_validator, model_validator

from trainer.config.section import Seconds, Section, setting

STARTS_HERE = "local"
"""The address of a Ray that a run starts for itself, as `ray.init` has it."""

_ENVIRONMENTS = ("py_executable", "pip", "uv", "conda", "container", "image_uri")
"""Keys of Ray's runtime environment that give Python another environment."""


def _check_line(setting: str, value: str | int) -> None:
    if not str(value).isprintable() or not str(value).strip():
        raise ValueError(f"{setting}: {value!r} is not allowed. It is one line of printable text, and not empty.")


class Ray(Section):
    """The Ray cluster that runs the ranks."""

    address: str | None = setting(
        None,
        about=(
            "Address of a running cluster, or `local` to start a Ray on this machine for this run. Default: no Ray;"
            " the ranks are processes of this machine."
        ),
        example="auto",
    )
    start_timeout: Seconds = setting(
        300,
        about=(
            "How long to wait until the cluster has room for the ranks, and then until their processes have started."
        ),
        example=600,
    )
    resize_interval: Seconds = setting(
        60,
        about=(
            "With cluster.workers: [fewest, most]: how often the run checks whether the cluster has room for more"
            " ranks."
        ),
        example=300,
    )
    cpus_per_worker: float = setting(1, about="CPUs that Ray reserves for each rank.", example=8, gt=0, unit="CPUs")
    memory_per_worker: float | None = setting(
        None, about="Host memory that Ray reserves for each rank. Default: none.", example=64, gt=0, unit="GiB"
    )
    resources: dict[str, float] = setting(
        {}, about="Custom resources that Ray reserves for each rank.", example={"accelerator_type:H100": 0.01}
    )
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = setting(
        "PACK",
        about=(
            "How Ray places the ranks. PACK: it fills one machine after the other. SPREAD: it uses as many machines"
            " as possible. STRICT_PACK and STRICT_SPREAD: all ranks on one machine, or each on a machine of its own;"
            " otherwise the run does not start."
        ),
        example="SPREAD",
    )
    runtime_env: dict[str, Any] = setting(
        {},
        about=(
            "Ray's runtime environment for `capstan submit ray`: env_vars, pip, image_uri and so on. Its working_dir"
            " is the run's code snapshot."
        ),
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
    """The job that `capstan submit slurm` makes: its resources, and what happens after a time limit or a lost node."""

    nodes: int = setting(1, about="Number of nodes.", example=2, ge=1, unit="nodes")
    gpus_per_node: int | None = setting(
        None, about="GPUs of each node. Default: none; the ranks run on CPUs.", example=8, ge=1, unit="GPUs"
    )
    gpu_type: str | None = setting(None, about="The type of GPU, as Slurm names it.", example="h100")
    cpus_per_node: int | None = setting(
        None,
        about=(
            "CPUs of each node. Default: for each rank of the node, cluster.threads_per_worker; if that is not set, 8"
            " for a rank with a GPU and 1 for a rank without."
        ),
        example=96,
        ge=1,
        unit="CPUs",
    )
    memory_per_node: str | None = setting(
        None,
        about=(
            "Memory of each node, in Slurm's notation (--mem); a number without a unit is in MB, and 0 means all of"
            " the node's memory. Default: the partition's default, which is often too little."
        ),
        example="900G",
        pattern=r"^\d+[KMGT]?$",
    )
    partition: str | None = setting(None, about="Partition, or several partitions separated by commas.", example="gpu")
    account: str | None = setting(None, about="Account to charge.", example="nlp")
    qos: str | None = setting(None, about="Quality of service.", example="high")
    time: str | None = setting(
        None,
        about="Time limit of one job. The run goes on in the next job. Default: the partition's limit.",
        example="24:00:00",
        pattern=r"^(\d+-)?\d+(:\d+){0,2}$",
        unit="[days-]hours:minutes:seconds",
    )
    constraint: str | None = setting(None, about="Features that nodes must have.", example="ib&h100")
    exclude: str | None = setting(None, about="Nodes not to use.", example="n[7,12]")
    comment: str | None = setting(None, about="A comment that Slurm records with the job.", example="second try")
    extra: list[str] = setting(
        [], about="Further options for sbatch, one in each entry.", example=["--reservation=team"]
    )
    setup: list[str] = setting(
        [],
        about="Shell commands that the job runs first, for instance to load modules.",
        example=["module load cuda/12.8"],
    )
    container: list[str] = setting(
        [],
        about="Words that Capstan puts before each Python command on the nodes, to run it in a container.",
        example=["apptainer", "exec", "--nv", "/images/capstan.sif"],
    )
    python: str | None = setting(
        None,
        about="Path of Python on the nodes. Default: the path of the Python that submits.",
        example="/opt/capstan/bin/python",
    )
    local_dir: str = setting(
        "/tmp",
        about="A folder on each node's own disk, for the session files of Ray and for unpacked environments.",
        example="/local/scratch",
    )
    output: str | None = setting(
        None,
        about=(
            "Folder for the job's output file. Default: the run's folder if the store is a folder, otherwise the"
            " current folder."
        ),
        example="/home/me/logs",
    )
    launch: Literal["ray", "direct"] = setting(
        "ray",
        about=(
            "How the job starts the ranks. ray: with a Ray that it starts on the nodes. direct: with srun; a rank"
            " that dies is then restarted within the job only if cluster.keeper is set."
        ),
        example="direct",
    )
    signal_seconds: int = setting(
        300,
        about="How long before the time limit the run commits and stops. The commit must fit into this time.",
        example=600,
        ge=30,
        le=65535,
        unit="seconds",
    )
    chain: int = setting(
        0,
        about=(
            "If jobs must not be requeued: how many jobs to submit at once, which run one after another. 0: one job,"
            " which requeues itself."
        ),
        example=4,
        ge=0,
        le=100,
        unit="jobs",
    )

    @field_validator("memory_per_node", mode="before")
    @classmethod
    def _number_is_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_line_each(self) -> "Slurm":
        for name, given in self:
            for value in given if isinstance(given, list) else [given]:
                if isinstance(value, str):
                    _check_line(f"cluster.slurm.{name}", value)
        for option in self.extra:
            if not re.match(r"^-(-[a-z][a-z-]*|[A-Za-z])(=|$)", option):
                raise ValueError(
                    f"cluster.slurm.extra: {option!r} is not allowed. Give each option as --name=value or --name."
                )
        if self.gpu_type and not self.gpus_per_node:
            raise ValueError("cluster.slurm.gpu_type: has no effect without cluster.slurm.gpus_per_node. Set that too.")
        return self


class Cluster(Section):
    """The number of ranks, and the machines that run them."""

    workers: int | tuple[int, int] | None = setting(
        None,
        about=(
            "Number of ranks. Or [fewest, most] for a run that shrinks when machines leave the Ray cluster and grows"
            " when machines join. Default: one rank for each GPU of the cluster; one rank without GPUs."
        ),
        example=[8, 32],
        unit="ranks",
    )
    gpus_per_worker: Literal[0, 1] | None = setting(
        None,
        about=(
            "GPUs of each rank. 0: the rank uses the CPU. Default: 1 if there are GPUs, otherwise 0. If there are"
            " GPUs that torch cannot use, the run ends with an error."
        ),
        example=1,
        unit="GPUs",
    )
    threads_per_worker: int | None = setting(
        None,
        about="CPU threads of each rank (OMP_NUM_THREADS). Default: the machine's cores divided by its ranks.",
        example=8,
        ge=1,
        unit="threads",
    )
    keeper: bool = setting(
        False,
        about=(
            "Keep a process, the keeper, on each machine. It has imported everything, and holds a copy of what the"
            " ranks would lose. Ranks are forked from the keeper. If a rank dies, the run goes on from the last"
            " update, and reads nothing of the base again."
        ),
        example=True,
    )
    copies: bool | None = setting(
        None,
        about=(
            "With cluster.keeper on several machines: after each update, copy the trained weights and the optimizer's"
            " state to another machine's keeper too, so that they survive the loss of a machine. Default: true for"
            " adapters, false if the base itself learns."
        ),
        example=True,
    )
    spares: int = setting(
        0,
        about=(
            "Number of spare machines, in addition to those of the ranks. A spare waits with a keeper that has"
            " imported everything. If a machine is lost, a spare takes its place, and the run goes on at once with"
            " the same number of ranks. A Slurm job asks for this number of nodes in addition to cluster.slurm.nodes."
        ),
        example=1,
        ge=0,
        unit="machines",
    )
    environment: Literal["shared", "archive"] = setting(
        "shared",
        about=(
            "The Python environment of a submitted run. shared: each machine has an environment of its own, or sees"
            " yours at the same path. archive: `submit` packs the virtual environment that it runs in into one file"
            " in the store, and each machine unpacks this file once on its own disk."
        ),
        example="archive",
    )
    nccl: dict[str, str | int] = setting(
        {},
        about=(
            "NCCL's variables (network interfaces, InfiniBand adapters and so on), for every rank, however the ranks"
            " are started. They override the environment. `capstan doctor --config` shows which network NCCL would"
            " take with them."
        ),
        example={"NCCL_SOCKET_IFNAME": "eth0", "NCCL_IB_HCA": "mlx5_0,mlx5_1"},
    )
    ray: Ray = Ray()
    slurm: Slurm = Slurm()

    @model_validator(mode="after")
    def _copies_need_a_keeper(self) -> "Cluster":
        if self.copies and not self.keeper:
            raise ValueError("cluster.copies: has no effect without cluster.keeper. Set cluster.keeper: true too.")
        return self

    @model_validator(mode="after")
    def _spares_have_a_use(self) -> "Cluster":
        if not self.spares:
            return self
        if not self.keeper:
            raise ValueError("cluster.spares: has no effect without cluster.keeper. Set cluster.keeper: true too.")
        if isinstance(self.workers, tuple) and self.workers[0] < self.workers[1]:
            raise ValueError(
                f"cluster.spares: {self.spares} is not allowed with cluster.workers: {list(self.workers)}. A spare"
                f" machine keeps the number of ranks. Give one number, such as {self.workers[1]}, or remove"
                " cluster.spares."
            )
        if self.ray.placement == "SPREAD":
            raise ValueError(
                f"cluster.spares: {self.spares} is not allowed with cluster.ray.placement: SPREAD, which puts ranks on"
                " all machines. Use PACK, or STRICT_SPREAD for one rank on each machine."
            )
        return self

    @model_validator(mode="after")
    def _one_environment(self) -> "Cluster":
        if self.environment != "archive":
            return self
        others = [f"cluster.ray.runtime_env: {name}" for name in self.ray.runtime_env if name in _ENVIRONMENTS]
        if others := [*others, *(["cluster.slurm.container"] if self.slurm.container else [])]:
            raise ValueError(
                f"cluster.environment: archive and {others[0]} both give the run its Python environment. Remove one."
            )
        return self

    @field_validator("nccl")
    @classmethod
    def _variables_of_nccl(cls, given: dict[str, str | int]) -> dict[str, str | int]:
        for name, value in given.items():
            if not re.fullmatch(r"NCCL_[A-Z0-9_]+", name):
                raise ValueError(
                    f"cluster.nccl: {name!r} is not allowed. It takes NCCL's own variables by their names, such as "
                    "NCCL_SOCKET_IFNAME."
                )
            _check_line(f"cluster.nccl.{name}", value)
        return given

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
        """The least number of ranks that the run needs; None if the cluster decides."""
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def most_workers(self) -> int | None:
        """The largest number of ranks that the run takes; None if the cluster decides."""
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers

    @property
    def nccl_variables(self) -> dict[str, str]:
        """`nccl` as a process's environment takes it."""
        return {name: str(value) for name, value in self.nccl.items()}
