"""`capstan submit slurm`, `status` and `stop` against a real Slurm, and the batch file's own mechanics; no training."""

import json
import re
import sys
from pathlib import Path

from launcher.cluster.slurm.submit import slurm_quoted
from tests.cli.conftest import ENVIRONMENT
from tests.material import commit
from tests.slurm.cluster import NETWORK, Cluster
from tests.slurm.site import Site
from trainer.config import load_config
from trainer.run import layout

HELD = "cluster.slurm.extra=[--hold]"

# It answers as launcher.cluster.slurm.job and a rank would: the first rank ends with 1, which leads to a start without
# its node.
FAKE_PYTHON = """\
#!/bin/bash
case "$2 $3 ${SLURM_RESTART_COUNT:-0}" in
  *slurm.job\\ begin*) echo run ;;
  *slurm.job\\ end\\ 0) echo "$*" >>"$FOLDER/ends"; echo "requeue $(cat "$FOLDER/node.0")" ;;
  *slurm.job\\ end*) echo "$*" >>"$FOLDER/ends"; echo "end 0" ;;
  *slurm.step\\ rank*) echo "$SLURMD_NODENAME" >"$FOLDER/node.${SLURM_RESTART_COUNT:-0}"; exit $((1 - ${SLURM_RESTART_COUNT:-0})) ;;
esac
"""


def test_a_dry_run_prints_the_batch_file_and_changes_nothing(site: Site) -> None:
    config = site.config("unborn", "cluster.slurm.partition=main", "cluster.slurm.time='10'")
    done = site.capstan("submit", "slurm", config, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=capstan:unborn\n#SBATCH --nodes=2\n")
    assert done.stdout.rstrip().endswith((Path(__file__).parents[2] / "slurm" / "run.sh").read_text().rstrip())
    assert not (site.folder / "store/unborn").exists()
    assert site.cluster.run("sbatch", "--test-only", input=done.stdout) == ""


# What torch finds here and how long its import takes is not Slurm's.
DOCTOR = """
import launcher.doctor.doctor as doctor
doctor._accelerator, doctor.check_imports = (lambda: ()), (lambda: doctor.Check("imports", "ok", ""))
from launcher.cli.__main__ import main
main()
"""


def test_the_doctor_asks_every_node_of_its_allocation_what_nccl_takes(site: Site) -> None:
    """From a configuration too, which wins over the environment."""
    config = site.config("network", "cluster.nccl={NCCL_SOCKET_IFNAME: nope}")
    inside = ("salloc", "--nodes=2", "--exclude=n2", "--quiet", sys.executable, "-c", DOCTOR, "doctor", "--json")
    environment = {**ENVIRONMENT, "NCCL_SOCKET_IFNAME": "^lo"}
    for more, state in (((), "ok"), (("--config", str(config)), "missing")):
        done = site.cluster.attempt(*inside, *more, cwd=site.folder, environment=environment, timeout=300)
        checks = [check for check in json.loads(done.stdout)["checks"] if check["name"] == "NCCL"]
        assert {check["state"] for check in checks} == {state}, done.stderr
        found = " ".join(check["found"] for check in checks)
        for node, address in (("n1", ".11"), ("n3", ".13")):
            assert (f"{node}: sockets over " in found and f"{NETWORK}{address}" in found) == (state == "ok"), found
            assert (f"nope names no interface of {node}" in found) == (state == "missing")


def test_a_refusal_is_told_in_slurms_own_words_and_the_name_stays_free(site: Site) -> None:
    config = site.config("misplaced")
    done = site.capstan("submit", "slurm", config, "cluster.slurm.partition=nope", "cluster.slurm.account=it's")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "capstan: Slurm refuses the job: invalid partition specified: nope; "
        "Batch job submission failed: Invalid partition name specified"
    )
    assert not site.run("misplaced").exists(layout.CONFIG)


def test_a_pending_job_says_why_it_waits_and_stop_cancels_it(site: Site) -> None:
    config = site.config("waiting", HELD)
    job = site.submit(config)
    (found,) = site.status("waiting")["slurm"]["jobs"]
    assert (found["job"], found["state"], found["reason"]) == (job, "PENDING", "JobHeldUser")
    shown = site.capstan("status", site.folder / "store/waiting").stdout
    assert re.search(rf"job {job} +PENDING: held; `scontrol release` lets it go", shown)
    taken = site.capstan("submit", "slurm", config)
    assert (taken.returncode, "whose job has not begun" in taken.stderr) == (2, True)
    data = site.workshop.prepare(load_config(config)).train
    commit(site.run("waiting"), load_config(config), step=5, dataset=data)  # it may be resumed, but not twice
    twice = site.capstan("submit", "slurm", config, "--resume", "--take-over")
    assert (twice.returncode, f"job {job} of {site.run('waiting').uri} is PENDING" in twice.stderr) == (2, True)
    site.run("waiting").delete(layout.manifest(5))

    assert "is to be cancelled" in site.capstan("stop", site.folder / "store/waiting", "--dry-run").stderr
    assert site.status("waiting")["slurm"]["jobs"][0]["state"] == "PENDING"
    assert site.capstan("stop", site.folder / "store/waiting").returncode == 0
    status = site.status("waiting")
    assert (status["state"], status["slurm"]["jobs"][0]["state"]) == ("stopped", "CANCELLED")
    assert site.submit(config) == job + 1  # the run had nothing to lose: its name is free again
    site.capstan("stop", site.folder / "store/waiting")


def test_a_run_waits_for_the_run_that_it_comes_after(site: Site) -> None:
    first = site.submit(site.config("former", HELD))
    second = site.submit(site.config("latter"), "--after", "former")
    job = site.cluster.job(second)
    assert (job["job_state"], job["state_reason"]) == (["PENDING"], "Dependency")
    assert job["dependency"] == f"afterok:{first}(unfulfilled)"
    site.capstan("stop", site.folder / "store/latter")
    site.capstan("stop", site.folder / "store/former")

    nowhere = site.capstan("submit", "slurm", site.config("orphan"), "--after", "nobody", "--dry-run")
    assert (nowhere.returncode, "there is no run 'nobody'" in nowhere.stderr) == (2, True)


def test_slurms_own_parser_reads_every_option_as_it_was_given(cluster: Cluster, tmp_path: Path) -> None:
    comments = [
        "it's",
        '"',
        "\\",
        "a # b",
        "$(touch owned) `id`",
        "x; hetjob packjob",
        "--wrap=x",
        " é ",
        "\\n\\",
        "a'\"b",
    ]
    for comment in comments:
        script = f"#!/bin/bash\n#SBATCH --hold\n#SBATCH --comment={slurm_quoted(comment)}\n#SBATCH --nodes=2\ntrue\n"
        job = int(cluster.run("sbatch", "--parsable", input=script, cwd=tmp_path))
        found = cluster.job(job)
        cluster.run("scancel", str(job))
        assert (found["comment"], found["node_count"]["number"]) == (comment, 2)
    assert list(tmp_path.iterdir()) == []


def test_the_job_is_requeued_without_the_node_that_is_bad(site: Site, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    config = site.config(
        "picky",
        "cluster.workers=1",
        "cluster.slurm.nodes=1",
        "cluster.slurm.launch=direct",
        f"cluster.slurm.python={python}",
        f"cluster.slurm.setup=['export FOLDER={tmp_path}']",
    )
    job = site.submit(config)
    site.assert_ends("picky", job, "COMPLETED")
    bad, good = ((tmp_path / f"node.{start}").read_text().strip() for start in (0, 1))
    found = site.cluster.job(job)
    assert (found["excluded_nodes"], found["restart_cnt"]) == (bad, 1)
    assert good != bad
    ends = (tmp_path / "ends").read_text().splitlines()
    assert ["--exit-code 1 --signal" in ends[0], "--exit-code 0 --signal" in ends[1]] == [True, True]


def test_the_record_of_a_submission_is_in_the_runs_folder(site: Site) -> None:
    job = site.submit(site.config("kept", HELD))
    record = json.loads(site.run("kept").get(layout.SLURM_JOB))
    assert record["jobs"] == [job]
    assert site.run("kept").get(layout.SLURM_SCRIPT).startswith(b"#!/bin/bash\n#SBATCH")
    assert site.run("kept").exists(layout.SNAPSHOT)
    site.capstan("stop", site.folder / "store/kept")
