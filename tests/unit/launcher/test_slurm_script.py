"""The batch file: what it holds, and that nothing that a user writes breaks out of its place in it."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.cluster.slurm.submit import JobShape, inside_a_job, render_batch_file, sbatch_options, shape, slurm_quoted
from trainer.config import Config, Slurm, load_config, parse_config
from trainer.errors import ConfigError

RUN = """
run: {name: big, store: s3://bucket/runs}
model: {base: /models/base}
data: {train: [{path: d.jsonl}]}
train: {steps: 5}
cluster: {slurm: {nodes: 2}}
"""
# Text that a shell, Slurm's own parser or a careless template would act on.
HOSTILE = st.lists(
    st.sampled_from([*"\"'`$(){}[]<>|&;#!*?~\\%@=, abc", "$(touch owned)", "hetjob", "'; exit 9; '", "é", "#SBATCH"]),
    min_size=1,
    max_size=20,
).map("".join)


def config(*overrides: str) -> Config:
    return parse_config(RUN, overrides)


def script(run: Config, uri: str = "s3://bucket/runs/big") -> str:
    return render_batch_file(run, uri, "0a1b2c3d", sbatch_options(run, "/logs/slurm-%j.out", []))


def header_and_body(text: str) -> tuple[str, str]:
    body = (Path(__file__).parents[3] / "slurm" / "run.sh").read_text()
    assert text.endswith(body)
    return text.removesuffix(body), body


def test_spare_nodes_come_on_top_and_the_job_outlives_a_lost_one() -> None:
    run = config("cluster.workers=4", "cluster.keeper=true", "cluster.spares=1", "cluster.slurm.launch=direct")
    run = inside_a_job(run)
    assert run.retry.preemptions == 1
    assert shape(run) == JobShape(nodes=3, ranks=4, rank_nodes=2, ranks_per_node=2, cpus_per_node=2)
    header, _ = header_and_body(script(run))
    lines = header.splitlines()
    assert {"#SBATCH --nodes=3", "#SBATCH --no-kill", "RANK_NODES=2", "SPARES=1", "KEEPER=yes"} <= set(lines)
    without, _ = header_and_body(script(config("cluster.workers=4")))
    assert "no-kill" not in without
    assert "SPARES" not in without


def test_the_batch_file_is_the_options_then_the_values_then_the_same_code_for_every_run() -> None:
    run = config(
        "cluster.slurm.gpus_per_node=8",
        "cluster.slurm.gpu_type=h100",
        "cluster.slurm.cpus_per_node=96",
        "cluster.slurm.memory_per_node='0'",
        "cluster.slurm.partition=gpu",
        "cluster.slurm.account=nlp team",
        "cluster.slurm.qos=high",
        "cluster.slurm.time='1-12:00:00'",
        "cluster.slurm.constraint=ib&h100",
        "cluster.slurm.exclude='n[7,12]'",
        'cluster.slurm.comment=it\'s "mine"',
        "cluster.slurm.extra=[--reservation=my team, --exclusive]",
        "cluster.slurm.setup=[module load cuda/12.8, export NCCL_SOCKET_IFNAME=ib0]",
        "cluster.slurm.container=[apptainer, exec, --nv, /images/my image.sif]",
        "cluster.slurm.python=/opt/capstan/bin/python",
    )
    header, _ = header_and_body(script(run))
    assert (
        header
        == """\
#!/bin/bash
#SBATCH --job-name=capstan:big
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --gpus-per-node=h100:8
#SBATCH --mem=0
#SBATCH --partition=gpu
#SBATCH --account="nlp team"
#SBATCH --qos=high
#SBATCH --time=1-12:00:00
#SBATCH --constraint="ib&h100"
#SBATCH --exclude=n[7,12]
#SBATCH --comment="it's \\"mine\\""
#SBATCH --output=/logs/slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --reservation="my team"
#SBATCH --exclusive

RUN_NAME=big
RUN_URI=s3://bucket/runs/big
SUBMISSION=0a1b2c3d
PYTHON=/opt/capstan/bin/python
CONTAINER=(apptainer exec --nv '/images/my image.sif')
LAUNCH=ray
RANK_NODES=2
RANKS_PER_NODE=8
CPUS_PER_NODE=96
RAY_CPUS=8
LOCAL_DIR=/tmp

# cluster.slurm.setup
module load cuda/12.8
export NCCL_SOCKET_IFNAME=ib0

"""
    )


def test_the_code_is_valid_bash() -> None:
    checked = subprocess.run(["bash", "-n"], input=script(config("cluster.workers=2")), capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_a_chain_is_of_jobs_that_follow_each_other_and_are_never_requeued() -> None:
    run = config("cluster.workers=2", "cluster.slurm.chain=3")
    found = sbatch_options(run, "out", ["afterok:12"])
    assert found["dependency"] == "afterok:12,singleton"
    assert "no-requeue" in found
    assert "requeue" not in found


@settings(max_examples=60, deadline=None)
@given(hostile=st.lists(HOSTILE.filter(str.strip), min_size=5, max_size=5), newline=st.booleans())
def test_no_value_breaks_out_of_its_quotes_in_a_real_bash(hostile: list[str], newline: bool) -> None:
    account, comment, python, word, folder = hostile
    uri = f"file:///{folder}" + ("\nexit 9" if newline else "")
    slurm = Slurm(account=account, comment=comment, python=python, container=[word, "x y"], local_dir=folder)
    base = config("cluster.workers=2")
    run = base.model_copy(update={"cluster": base.cluster.model_copy(update={"slurm": slurm})})
    header, _ = header_and_body(script(run, uri))
    probe = 'printf "%s\\0" "$RUN_URI" "$PYTHON" "${CONTAINER[@]}" "$LOCAL_DIR" "$SUBMISSION"'
    done = subprocess.run(["bash", "-u"], input=f"{header}{probe}", capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\0") == [uri, python, word, "x y", folder, "0a1b2c3d", ""]


@pytest.mark.parametrize("name", ["account", "comment", "constraint", "partition", "extra", "container", "setup"])
@pytest.mark.parametrize("value", ["a\\nexit 9", "a\\r", "\\e[0m", ""])
def test_a_line_break_is_refused_with_its_setting(name: str, value: str) -> None:
    quoted = f'["{value}"]' if name in ("extra", "container", "setup") else f'"{value}"'
    with pytest.raises(ConfigError, match=rf"cluster\.slurm\.{name}: .* one line of printable text"):
        config(f"cluster.slurm.{name}={quoted}")


def test_an_option_that_is_no_single_line_is_refused() -> None:
    with pytest.raises(ConfigError, match="line break"):
        slurm_quoted("runs\n#SBATCH --wrap=x")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"cluster\.workers: missing"),
        (["cluster.workers=3"], r"cluster\.workers: 3 ranks do not divide over cluster\.slurm\.nodes: 2"),
        (["cluster.workers=8", "cluster.slurm.gpus_per_node=2"], r"4 ranks on each node need as many GPUs"),
        (["cluster.workers=8", "cluster.slurm.cpus_per_node=2"], r"cpus_per_node: 2 is less than the 4 ranks"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shape(config(*overrides))


def test_every_gpu_gets_a_rank_unless_told_otherwise() -> None:
    assert shape(config("cluster.slurm.gpus_per_node=8")).ranks_per_node == 8
    assert shape(config("cluster.slurm.gpus_per_node=8", "cluster.workers=4")).ranks_per_node == 2


@pytest.mark.parametrize(
    ("overrides", "cpus"),
    [
        (["cluster.workers=4"], 2),
        (["gpus_per_node=8"], 64),  # eight a GPU: one would have to load data, drive the GPU and upload checkpoints
        (["gpus_per_node=8", "cluster.workers=4"], 16),
        (["gpus_per_node=8", "cluster.ray.cpus_per_worker=12"], 96),
        (["gpus_per_node=8", "cluster.threads_per_worker=3"], 24),
        (["gpus_per_node=8", "cpus_per_node=12"], 12),
    ],
)
def test_cpus_are_asked_for_by_what_a_rank_uses(overrides: list[str], cpus: int) -> None:
    run = config(*(text if "." in text.split("=")[0] else f"cluster.slurm.{text}" for text in overrides))
    assert shape(run).cpus_per_node == cpus
    assert sbatch_options(run, "out", [])["cpus-per-task"] == str(cpus)


def test_ranks_of_a_job_that_asks_for_gpus_compute_on_nothing_else() -> None:
    assert inside_a_job(config("cluster.slurm.gpus_per_node=8")).cluster.gpus_per_worker == 1
    assert (
        inside_a_job(config("cluster.slurm.gpus_per_node=8", "cluster.gpus_per_worker=0")).cluster.gpus_per_worker == 0
    )
    assert inside_a_job(config("cluster.workers=2")).cluster.gpus_per_worker is None


def test_the_example_divides_its_ranks_over_its_nodes() -> None:
    example = load_config(Path(__file__).parents[3] / "examples/70b-slurm.yaml")
    assert shape(example) == JobShape(nodes=2, ranks=16, rank_nodes=2, ranks_per_node=8, cpus_per_node=64)


@pytest.mark.parametrize(
    ("launch", "nodes", "serve", "expected"),
    [
        ("direct", 3, "{replicas: 2, gpus: 4}", JobShape(3, 16, 2, 8, 64, 1)),
        ("direct", 3, "{replicas: 2, gpus: 5}", JobShape(3, 8, 1, 8, 64, 2)),
        ("direct", 5, "{replicas: 5, gpus: 3}", JobShape(5, 16, 2, 8, 64, 3)),  # two on a node
        ("direct", 1, "{replicas: 2, gpus: 1}", JobShape(1, 6, 1, 6, 64, 1)),
        ("direct", 2, "{replicas: 2, gpus: 0}", JobShape(2, 16, 2, 8, 64, 1)),
        ("ray", 2, "{replicas: 1, gpus: 3}", JobShape(2, 13, 2, 7, 64, 1)),
    ],
)
def test_servers_have_nodes_or_gpus_of_their_own(launch: str, nodes: int, serve: str, expected: JobShape) -> None:
    of_job = (f"cluster.slurm={{nodes: {nodes}, gpus_per_node: 8, launch: {launch}}}", f"rollout.serve={serve}")
    assert shape(config("rollout.engine=serve", *of_job)) == expected


def test_ranks_on_cpus_leave_the_gpus_to_the_servers() -> None:
    of_job = ("cluster.slurm={nodes: 1, gpus_per_node: 8, launch: direct}", "rollout.serve={replicas: 1, gpus: 6}")
    on_cpus = ("cluster.workers=4", "cluster.gpus_per_worker=0")
    assert shape(config("rollout.engine=serve", *of_job, *on_cpus)) == JobShape(1, 4, 1, 4, 64, 1)
    with pytest.raises(ConfigError, match=r"1 x 6 GPUs for servers leave 2 of .* for 4 ranks"):
        shape(config("rollout.engine=serve", *of_job, "cluster.workers=4"))


@pytest.mark.parametrize(
    ("serve", "message"),
    [
        ("{gpus: 9}", r"rollout\.serve\.gpus: 9 GPUs for a server are more than cluster\.slurm\.gpus_per_node: 8"),
        ("{replicas: 2, gpus: 8}", r"rollout\.serve: 2 x 8 GPUs for servers leave 0 of cluster\.slurm\.nodes: 2 x gpus_per_node: 8 for the ranks"),
        ("{replicas: 9, gpus: 8}", r"rollout\.serve: 9 x 8 GPUs for servers leave 0 of"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("launch", ["ray", "direct"])
def test_a_job_without_room_for_servers_is_refused(launch: str, serve: str, message: str) -> None:
    of_job = (f"cluster.slurm={{nodes: 2, gpus_per_node: 8, launch: {launch}}}", f"rollout.serve={serve}")
    with pytest.raises(ConfigError, match=message):
        shape(config("rollout.engine=serve", *of_job))


def test_the_batch_file_of_srun_says_the_servers() -> None:
    served = ("rollout.engine=serve", "rollout.serve={replicas: 2, gpus: 4}", "objective.name=grpo")
    of_job = "cluster.slurm={nodes: 3, gpus_per_node: 8, launch: direct, python: /opt/capstan/bin/python}"
    header, _ = header_and_body(script(config(*served, of_job)))
    assert (
        header.partition("#SBATCH --requeue\n")[2]
        == """\

# beside the ranks: 2 servers (vllm serve) on 4 GPUs each, and capstan rollout, which has them sample; each ends with the run, and is started again when it dies
RUN_NAME=big
RUN_URI=s3://bucket/runs/big
SUBMISSION=0a1b2c3d
PYTHON=/opt/capstan/bin/python
CONTAINER=()
LAUNCH=direct
RANK_NODES=2
RANKS_PER_NODE=8
CPUS_PER_NODE=64
RAY_CPUS=8
LOCAL_DIR=/tmp
SERVERS=2
SERVER_NODES=1

"""
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "cluster.slurm.extra=[reservation]",
            r"cluster\.slurm\.extra: 'reservation' is not allowed\. Give each option",
        ),
        ("cluster.slurm.gpu_type=h100", r"gpu_type: has no effect without cluster\.slurm\.gpus_per_node"),
        ("cluster.nccl={SOCKET_IFNAME: eth0}", r"cluster\.nccl: 'SOCKET_IFNAME' is not allowed\. It takes NCCL's own"),
        ("cluster.nccl={NCCL_IB_HCA: ''}", r"cluster\.nccl\.NCCL_IB_HCA: '' is not allowed\. It is one line"),
        ("cluster.slurm.time=a day", r"cluster\.slurm\.time: 'a day' is not allowed"),
        ("cluster.slurm.signal_seconds=5", r"cluster\.slurm\.signal_seconds: 5 is not allowed"),
    ],
)
def test_a_wrong_setting_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(override)
