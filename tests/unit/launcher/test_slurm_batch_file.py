"""The batch file, run by a real bash with stand-ins of Slurm, enroot and Python, as docs/slurm.md sets it up for
containers and nodes without internet."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from launcher.cluster.slurm.submit import render_batch_file, sbatch_options
from launcher.start.group import RANK_NODES, slurm_rank
from tests.pages import ROOT, blocks_of
from trainer.config import Config, load_config

_STAND_INS = {
    # Steps are counted as Slurm does; a step's task runs here. Words up to the command are options.
    "srun": (
        """
n=$(ls "$W"/steps | wc -l); touch "$W/steps/$n"
while [[ $1 == -* ]]; do shift; done
case "$1 $2" in "enroot create"|"rsync -a") echo "$*" >>"$W/setup"; exit ;; esac
export SLURM_STEP_ID=$n SLURM_PROCID=0; exec "$@" """
    ),
    # Nothing of the caller's environment but what the configuration prints, and what the image has.
    "enroot": (
        """
[ "$1 $2" = "start --conf" ] || exit 9
source "$3"; mounts >"$W/mounts"
readarray -t kept < <(environ | grep -E '^[A-Za-z_][A-Za-z0-9_]*='); shift 4
exec env -i PATH="$PATH" IMAGE=capstan "${kept[@]}" W="$W" "$@" """
    ),
    "scontrol": """echo node1""",
    "squeue": """echo RUNNING""",
    "scancel": """echo "$*" >>"$W/scancelled"; kill $(<"$W/ray")""",
    # Each module writes its environment down. Ray's start listens until it is told to end.
    "python": (
        """
shift; env -0 >"$W/$1"
case $1 in
  launcher.drive.driver) until [ -s "$W/ray" ]; do sleep 0.02; done ;;
  ray.scripts.scripts) all=$*; port=${all##*--port=}; echo $$ >"$W/ray"
    exec python3 -c "import socket, sys, time; s = socket.create_server(('', int(sys.argv[1]))); time.sleep(60)" "${port%% *}" ;;
  launcher.cluster.slurm.job) case $2 in
    ports) python3 -c "import socket; s = [socket.create_server(('', 0)) for _ in 'ab']; print(*(x.getsockname()[1] for x in s))" ;;
    begin) echo run ;;
    end) cat >/dev/null; echo end 0 ;; esac ;;
esac """
    ),
}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    for folder in ("bin", "steps", "local"):
        (tmp_path / folder).mkdir()
    for name, text in _STAND_INS.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/bash\n{text.strip()}\n")
        program.chmod(0o755)
    return tmp_path


def documented(site: Path, launch: str) -> Config:
    """The page's sections of containers, local disks and offline variables, in one file."""
    page = list(blocks_of(ROOT / "docs/slurm.md"))
    script = next(block.text for block in page if "environ()" in block.text)
    (site / "capstan-enroot.sh").write_text(script)
    tree = {
        "run": {"name": "big", "store": str(site / "store")},
        "model": {"base": "/models/base"},
        "data": {"train": [{"path": "d.jsonl"}]},
        "train": {"steps": 5},
    }
    slurm = {"setup": [], "nodes": 1, "local_dir": str(site / "local")}
    for block in page:
        if block.language == "yaml" and any(word in block.text for word in ("enroot", "rsync", "OFFLINE")):
            found = yaml.safe_load(block.text)
            tree["model"] |= found.get("model", {})
            slurm["setup"] += found["cluster"]["slurm"].pop("setup", [])
            slurm |= found["cluster"]["slurm"]
    assert slurm["container"][:2] == ["enroot", "start"]
    slurm["container"] = [word.replace("/shared", str(site)) for word in slurm["container"]]
    tree["cluster"] = {"workers": 1, "slurm": {**slurm, "python": "python", "launch": launch}}
    (site / "run.yaml").write_text(yaml.safe_dump(tree))
    return load_config(site / "run.yaml")


def environment_of(site: Path, module: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in (site / module).read_text().split("\0") if line)


@pytest.mark.parametrize("launch", [pytest.param("ray", marks=pytest.mark.long), "direct"])
def test_the_job_runs_in_a_container_with_its_environment_and_without_the_hub(site: Path, launch: str) -> None:
    run = documented(site, launch)
    text = render_batch_file(run, "file:///run", "0a1b", sbatch_options(run, "out", []))
    job = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node1", "SLURM_NNODES": "1", "SLURM_STEP_NODELIST": "node1"}
    environment = {"PATH": f"{site / 'bin'}:{os.environ['PATH']}", "HOME": "/home/me", "W": str(site), **job}
    # A function of the shell's, as those of modules, is no variable of a container.
    environment["BASH_FUNC_module%%"] = "() {  echo loaded\n}"
    done = subprocess.run(["bash"], input=text, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr

    module = "launcher.drive.driver" if launch == "ray" else "launcher.cluster.slurm.step"
    for name in ["launcher.cluster.slurm.job", module, *(["ray.scripts.scripts"] if launch == "ray" else [])]:
        found = environment_of(site, name)
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "offline", "HF_HOME": "/shared/hf"}
        assert {"IMAGE": "capstan", "SLURM_JOB_ID": "42", **offline}.items() <= found.items(), name
        assert "HOME" not in found  # the image's, or what enroot mounts
    assert "/shared /shared" in (site / "mounts").read_text()
    staged = (site / "setup").read_text()
    assert "enroot create --name capstan" in staged
    assert f"rsync -a /shared/bases/llama/ {run.model.base}/" in staged
    if launch == "ray":
        assert environment_of(site, "ray.scripts.scripts")["RAY_AUTH_TOKEN_PATH"].startswith(str(site / "local"))
        # Ray's step is not the job's first one: those of the setup were.
        assert (site / "scancelled").read_text() == "--signal=TERM 42.2\n"
    else:
        assert slurm_rank({**environment_of(site, module), "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "0"}) == {
            "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "20042",
        }  # fmt: skip


def test_ranks_are_numbered_in_the_order_of_nodes_that_the_job_says() -> None:
    """n4 has taken the place of n2. Slurm itself numbers tasks by the names of their nodes."""
    step = {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "3", "SLURM_JOB_ID": "1", "MASTER_ADDR": "n1"}
    tasks = [(place, local, node) for place, node in enumerate(("n1", "n3", "n4")) for local in (0, 1)]
    made = {
        (node, local): slurm_rank(
            {
                **step,
                RANK_NODES: "n1,n4,n3",
                "SLURM_PROCID": str(2 * place + local),
                "SLURM_LOCALID": str(local),
                "SLURMD_NODENAME": node,
            }
        )
        for place, local, node in tasks
    }
    sizes = {(one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"], one["MASTER_ADDR"]) for one in made.values()}
    assert sizes == {("6", "2", "n1")}
    assert {place: one["RANK"] for place, one in made.items()} == {
        ("n1", 0): "0", ("n1", 1): "1", ("n4", 0): "2", ("n4", 1): "3", ("n3", 0): "4", ("n3", 1): "5"
    }  # fmt: skip
