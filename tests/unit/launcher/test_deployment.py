"""The files by which others run Capstan: the manifest for KubeRay and the recipe of the container."""

import copy
import re
import tomllib
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.pages import ROOT, blocks_of, parse
from trainer.config import parse_config

SCHEMA = yaml.safe_load((ROOT / "tests/rayjob.schema.yaml").read_text(encoding="utf-8"))
CONFIG_MAP, RAY_JOB = yaml.safe_load_all((ROOT / "examples/kubernetes/rayjob.yaml").read_text(encoding="utf-8"))
CONTAINERFILE = (ROOT / "Containerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
INSTRUCTIONS = set(
    "FROM RUN WORKDIR ARG COPY USER ENV CMD ENTRYPOINT LABEL EXPOSE VOLUME SHELL STOPSIGNAL HEALTHCHECK ADD".split()
)


def problems(manifest: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(SCHEMA).iter_errors(manifest)]


def pods() -> list[dict[str, Any]]:
    cluster = RAY_JOB["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_manifest_has_the_fields_of_the_crd() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert problems(RAY_JOB) == []
    assert (CONFIG_MAP["apiVersion"], CONFIG_MAP["kind"]) == ("v1", "ConfigMap")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("spec.entryPoint", "capstan", "'entryPoint' was unexpected"),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams", {"num-cpus": 8}, "8 is not of type 'string'"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.replicas", "2", "'2' is not of type 'integer'"),
        (
            "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.resources.limits",
            {"nvidia.com/gpu": 8},
            "8 is not of type",
        ),
        ("apiVersion", "ray.io/v1alpha1", "'ray.io/v1' was expected"),
    ],
)
def test_a_wrong_field_is_found(path: str, value: Any, words: str) -> None:
    changed: Any = copy.deepcopy(RAY_JOB)
    node = changed
    *parents, leaf = path.split(".")
    for key in parents:
        node = node[int(key) if key.isdigit() else key]
    node[leaf] = value
    assert any(words in problem for problem in problems(changed))


def test_the_job_runs_a_configuration_that_asks_for_the_gpus_there_are() -> None:
    config = parse_config(CONFIG_MAP["data"]["run.yaml"])
    program, *arguments = RAY_JOB["spec"]["entrypoint"].split()
    assert program == "capstan"
    folder, _, name = str(parse(arguments).values["config"]).rpartition("/")
    assert name in CONFIG_MAP["data"]
    (run,) = (mount["name"] for mount in pods()[0]["containers"][0]["volumeMounts"] if mount["mountPath"] == folder)
    assert {"name": run, "configMap": {"name": CONFIG_MAP["metadata"]["name"]}} in pods()[0]["volumes"]
    (group,) = RAY_JOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    assert config.cluster.workers == group["replicas"] * int(worker["resources"]["limits"]["nvidia.com/gpu"])
    for pod in pods():
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_manifest_that_goes_on_with_the_run_resumes_the_one_that_the_first_began() -> None:
    (change,) = (block.text for block in blocks_of(ROOT / "docs/kuberay.md") if block.of == "kuberay")
    spec = yaml.safe_load(change)["spec"]
    assert problems({**RAY_JOB, "spec": {**RAY_JOB["spec"], **spec}}) == []
    run = parse_config(CONFIG_MAP["data"]["run.yaml"]).run
    assert parse(spec["entrypoint"].split()[1:]).values["run"] == f"{run.store}/{run.name}"


def test_the_manifest_names_the_versions_that_are_installed() -> None:
    (ray,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert RAY_JOB["spec"]["rayClusterSpec"]["rayVersion"] == ray
    tags = {container["image"].rpartition(":")[2] for pod in pods() for container in pod["containers"]}
    assert tags == {PROJECT["project"]["version"]}


def instructions(text: str) -> list[tuple[str, str]]:
    """Each instruction of a Containerfile with its words: comments left out, lines that go on joined."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return [
        (line.partition(" ")[0], line.partition(" ")[2].strip())
        for line in re.sub(r"\\\n\s*", " ", lines).splitlines()
        if line.strip()
    ]


def test_the_container_is_built_of_files_that_are_there_and_has_every_package() -> None:
    steps = instructions(CONTAINERFILE)
    assert {step for step, _ in steps} <= INSTRUCTIONS
    assert steps[0][0] == "FROM"
    copied = {source for step, words in steps if step == "COPY" for source in words.split()[:-1]}
    assert [name for name in copied if not (ROOT / name).exists()] == []
    packages = {name.removesuffix("*") for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {"pyproject.toml", "README.md", "LICENSE", "constraints.txt"} == copied
    allowed = set((ROOT / ".dockerignore").read_text(encoding="utf-8").split())
    assert {f"!{name}" for name in copied} <= allowed, "what is ignored is not there to be copied"


def test_the_container_keeps_to_the_rules_of_its_trade() -> None:
    steps = instructions(CONTAINERFILE)
    (base,) = (words for step, words in steps if step == "FROM")
    major, minor = map(int, re.findall(r"python:(\d+)\.(\d+)-", base)[0])
    assert (major, minor) >= (3, 11), PROJECT["project"]["requires-python"]
    for words in (words for step, words in steps if step == "RUN" and "apt-get install" in words):
        assert "--no-install-recommends" in words
        assert "rm -rf /var/lib/apt/lists/*" in words
    (install,) = (words for step, words in steps if step == "RUN" and words.startswith("pip install"))
    assert {"--no-cache-dir", "-c", "constraints.txt"} <= set(install.split())
    order = [step for step, _ in steps]
    assert order.index("USER") > max(number for number, step in enumerate(order) if step == "RUN"), "root ends last"
