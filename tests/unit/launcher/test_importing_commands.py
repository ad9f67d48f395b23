"""Commands of shell scripts that train: who reads them, where their keys are, and which values the script gives them."""

from pathlib import Path

import pytest

from launcher.init.importing.importing import Imported, import_files
from trainer.errors import ConfigError

_FILES = {
    "lf.yaml": "model_name_or_path: a/lf\nstage: sft\nfinetuning_type: lora\ndataset: d\nlearning_rate: 1.0e-3\n",
    "ax.yml": "base_model: a/ax\nadapter: lora\nlearning_rate: 0.001\ndatasets: [{path: a/b, type: alpaca}]\n",
    "recipe.yaml": "model_name_or_path: a/trl\ndataset_name: a/b\nuse_peft: true\nlearning_rate: 0.001\n",
    "acc.yaml": "distributed_type: MULTI_GPU\nnum_processes: 8\nmixed_precision: bf16\n",
}


def imported(command: str, folder: Path) -> Imported:
    for name, text in {**_FILES, "run.sh": f"#!/bin/bash\n{command}\n"}.items():
        (folder / name).write_text(text)
    return import_files([folder / "run.sh"])


@pytest.mark.parametrize(
    ("command", "tool", "base", "rate"),
    [
        ("llamafactory-cli train lf.yaml", "LLaMA-Factory", "a/lf", 1e-3),
        ("uv run llamafactory-cli train lf.yaml learning_rate=5e-5", "LLaMA-Factory", "a/lf", 5e-5),
        ("python src/train.py lf.yaml", "LLaMA-Factory", "a/lf", 1e-3),
        ("axolotl train ax.yml --learning-rate 1e-4", "axolotl", "a/ax", 1e-4),
        ("axolotl train ax.yml --launcher torchrun -- --standalone", "axolotl", "a/ax", 1e-3),
        ("python -m axolotl.cli.train ax.yml", "axolotl", "a/ax", 1e-3),
        ("docker run --gpus all image bash -c 'axolotl train ax.yml'", "axolotl", "a/ax", 1e-3),
        ("python scripts/run_sft.py recipe.yaml --learning_rate=1e-4", "TRL", "a/trl", 1e-4),
        ("srun --nodes 2 python -m alignment.sft --config recipe.yaml", "TRL", "a/trl", 1e-3),
        ("singularity exec --nv image bash -lc 'axolotl train ax.yml'", "axolotl", "a/ax", 1e-3),
        ("apptainer exec image bash -lc 'axolotl train ax.yml'", "axolotl", "a/ax", 1e-3),
        ("srun bash -euc 'axolotl train ax.yml'", "axolotl", "a/ax", 1e-3),
        ("CMD='trl sft --config recipe.yaml'\necho $CMD\neval $CMD", "TRL", "a/trl", 1e-3),
        (
            "cat > new.yaml <<EOF\nbase_model: a/new\nadapter: lora\nEOF\naxolotl train new.yaml",
            "axolotl",
            "a/new",
            None,
        ),
        (
            "cat > two.yaml <<EOF\nbase_model: a/two\nEOF\ncat >> two.yaml <<EOF\nadapter: lora\nlearning_rate: 1e-3\n"
            "EOF\naxolotl train two.yaml",
            "axolotl",
            "a/two",
            1e-3,
        ),
        ("nvidia-smi --query-gpu=a --format=b\nllamafactory-cli train lf.yaml", "LLaMA-Factory", "a/lf", 1e-3),
        ('D="$(cd -- "$(dirname "$0")" && pwd)"\naxolotl train ax.yml', "axolotl", "a/ax", 1e-3),
        ("swift/cli/sft.py --model a/b --dataset d.jsonl --learning_rate 1e-4", "ms-swift", "a/b", 1e-4),
    ],
)
def test_a_command_has_the_keys_of_its_file_and_its_own_over_them(
    command: str, tool: str, base: str, rate: float | None, tmp_path: Path
) -> None:
    found = imported(command, tmp_path)
    assert (found.peers, found.settings["model.base"], found.settings.get("optim.lr")) == ((tool,), base, rate)
    assert not [outcome.key for outcome in found.keys if outcome.status == "unknown"]


@pytest.mark.parametrize(
    ("command", "workers"),
    [
        ("torchrun --nproc_per_node 4 --nnodes 2 src/train.py lf.yaml", 8),
        ("torchrun --nproc_per_node=4 -m axolotl.cli.train ax.yml", 4),
        ("deepspeed --num_gpus 4 scripts/run_sft.py recipe.yaml", 4),
        ("accelerate launch --config_file acc.yaml src/train.py lf.yaml", 8),
        ("accelerate launch --config_file acc.yaml --num_processes 4 scripts/run_sft.py recipe.yaml", 4),
        ("accelerate launch --config_file acc.yaml --num_processes $N scripts/run_sft.py recipe.yaml", None),
    ],
)
def test_a_launcher_says_how_many_gpus_there_are(command: str, workers: int | None, tmp_path: Path) -> None:
    settings = imported(command, tmp_path).settings
    assert settings.get("cluster.workers") == workers
    micro = settings["train.micro_batch"]
    assert settings["train.global_batch"] == micro * (workers or 1)


@pytest.mark.parametrize("name", ["run.sh", "run.bash", "run.slurm", "run.sbatch", "run"])
def test_a_script_is_known_by_its_name_or_its_first_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "ax.yml").write_text(_FILES["ax.yml"])
    first = "" if "." in name else "#!/bin/bash\n"
    (tmp_path / name).write_text(f"{first}OUT: unused\naxolotl train ax.yml\n")
    assert import_files([tmp_path / name]).settings["model.base"] == "a/ax"


@pytest.mark.parametrize(("option", "gpus"), [("--no_cuda", 0), ("--no_cuda False", None), ("", None)])
def test_a_command_without_cuda_computes_on_the_cpu(option: str, gpus: int | None, tmp_path: Path) -> None:
    command = f"trl sft --model_name_or_path x --dataset_name a/b --use_peft {option}"
    assert imported(command, tmp_path).settings.get("cluster.gpus_per_worker") == gpus


def test_a_module_of_trls_says_what_is_trained(tmp_path: Path) -> None:
    found = imported("python -m trl.scripts.dpo --model_name_or_path x --dataset_name a/b", tmp_path)
    assert found.settings["objective.name"] == "dpo"
    assert not [line for line in found.to_do if line.startswith("objective.name")]


def test_a_script_of_ones_own_trains_the_whole_base_as_trl_does(tmp_path: Path) -> None:
    """Some of its keys are also those of other tools, whose default is an adapter."""
    options = "--model_name x --block_size 9 --num_train_epochs 5 --learning_rate 1e-5 --bf16 --seed 1"
    found = imported(f"torchrun --nproc-per-node 8 --master_port 12345 train/sft.py {options}", tmp_path)
    assert (found.peers, found.settings["tuning.method"]) == (("TRL",), "full")
    assert found.settings["cluster.workers"] == 8


@pytest.mark.parametrize(
    ("before", "options", "settings", "open_"),
    [
        ("GBS=128; N=4\nACC=$((GBS / (N * 2)))", "--gradient_accumulation_steps $ACC", {"train.global_batch": 128}, ""),
        ("N=9", "--lora_r $((N % 5))", {"tuning.rank": 4}, ""),
        ("N=9", "--lora_r $(expr $N - 5)", {"tuning.rank": 4}, ""),
        ("N=9", "--lora_r $((N / 2 + 1))", {"tuning.rank": 5}, ""),
        ("", "--lora_r $((2 ** 3))", {"tuning.rank": 16}, "lora_r: "),
        ("", "--lora_r $((8 / 0))", {"tuning.rank": 16}, "lora_r: "),
        ("", '--lora_r 8 "$@"', {"tuning.rank": 8}, ""),
        ("if [ $1 ]; then\n  R=4\nelse\n  R=8\nfi", "--lora_r $R", {"tuning.rank": 16}, "lora_r: $R"),
        ("if [ -z $R ]; then\n  R=4\nfi", "--lora_r $R", {"tuning.rank": 4}, ""),
        ('if [ $1 ]; then\n  E="--lora_r 4"\nelse\n  E=""\nfi', "--bf16 True $E", {"tuning.rank": 16}, "what $E adds"),
        ("A=(--lora_r 4)\nif [ $1 ]; then\n  A+=(--use_dora)\nfi", '"${A[@]}"', {"tuning.rank": 4}, "what A+=(--use"),
        ("NONE=()", "--lora_r 4", {"tuning.rank": 4}, ""),
        ("A=(--lora_r 4)\nA+=(--lora_alpha 9)", '"${A[@]}"', {"tuning.rank": 4, "tuning.alpha": 9.0}, ""),
    ],
)
def test_values_of_variables_are_those_that_the_script_gives_in_any_case(
    before: str, options: str, settings: dict[str, int], open_: str, tmp_path: Path
) -> None:
    command = "trl sft --model_name_or_path x --dataset_name a/b --use_peft"
    found = imported(f"{before}\n{command} {options}", tmp_path)
    assert {name: found.settings.get(name) for name in settings} == settings
    said = [line for line in found.to_do if "does not say" in line or "computed" in line]
    assert [open_ in line for line in said] == ([True] if open_ else [])


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("llamafactory-cli train other.yaml", r"has its keys in other\.yaml, which is not here"),
        ("llamafactory-cli train bytes.yaml", r"the file .*bytes\.yaml cannot be read: 'utf-8' codec"),
        ("trl sft --model_name_or_path x --dataset_name 'a/b", r"run\.sh is no command line: No closing quotation"),
        ('llamafactory-cli train "$1"', r"has its keys in \$1, and does not say which file that is"),
        ("python scripts/sft.py --config $C --bf16", r"has its keys in \$C, and does not say which file that is"),
    ],
)
def test_a_file_that_a_command_names_and_that_is_not_here_is_asked_for(command: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=said):
        imported(command, tmp_path)
