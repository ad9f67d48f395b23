"""Settings that follow from several keys at once, by the names that most peers give them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.importing.mapping import Keys
from trainer.config.peers import conversions as to
from trainer.config.peers.conversions import Inconvertible
from trainer.config.yaml_reader import read_yaml
from trainer.errors import ConfigError


def workers(keys: Keys, name: str) -> None:
    """`cluster.workers`, unless it is known already."""
    if keys.whole(name) > 0 and "cluster.workers" not in keys.settings:
        keys.put("cluster.workers", keys.whole(name), name)


def world(keys: Keys) -> int:
    """The devices that a batch is of, as far as they are known."""
    return max(1, int(keys.settings.get("cluster.workers") or 1))


def batch(keys: Keys, micro: str, accumulation: str = "gradient_accumulation_steps") -> None:
    """`train.global_batch`: rows a device, times accumulation, times devices."""
    devices = world(keys)
    keys.put("train.global_batch", keys.whole(micro, 1) * keys.whole(accumulation, 1) * devices, micro, accumulation)
    if devices > 1:
        keys.origins["train.global_batch"].append(f"on {devices} GPUs")


def in_4_bits(keys: Keys, asked: bool) -> bool:
    """Whether the base is stored in 4 bits: where that is `asked` for, and where 8 are."""
    if asked or not keys.asked("load_in_8bit"):
        return asked
    keys.lose("load_in_8bit", "The base is stored in 4 bits or in 16. Here in 4: quant.type: none is 16.")
    return True


def method(keys: Keys, key: str, full: bool, switches: Mapping[str, str]) -> str:
    """`tuning.method`: full, or the variant of LoRA that one of the `switches` asks for, or LoRA itself."""
    asked = [switch for switch in switches if not full and keys.asked(switch)]
    if len(asked) > 1:
        keys.lose(asked[0], "dora is scaled by alpha / rank. tuning.method is dora or rslora.")
    name = "full" if full else switches[asked[-1]] if asked else "lora"
    keys.put("tuning.method", name, key, *asked[-1:])
    return name


def simpo(keys: Keys) -> None:
    """SimPO's strengths where the file names none: those of the peers, which are not ours."""
    keys.settings.setdefault("objective.beta", 0.1)
    keys.settings.setdefault("objective.gamma", 0.5)


def duration(keys: Keys) -> None:
    """`train.steps` where the number of steps is limited, which then goes before epochs."""
    limit = keys.whole("max_steps")
    if limit > 0:
        keys.spare("train.epochs", "max_steps limits the run: train.steps.")
        keys.put("train.steps", limit, "max_steps")


def betas(keys: Keys) -> None:
    """`optim.betas`."""
    names = {"adam_beta1": 0.9, "adam_beta2": 0.999}
    given = [name for name in names if keys.given.get(name) is not None]
    if given:
        keys.attempt(
            given[-1], lambda: {"optim.betas": [to.number(keys.given.get(name) or names[name]) for name in names]}
        )
        if "optim.betas" in keys.settings:
            keys.put("optim.betas", keys.settings["optim.betas"], *given)


def least_rate(keys: Keys) -> None:
    """`optim.min_lr_ratio`, from the scheduler's own arguments."""
    if keys.given.get("cosine_min_lr_ratio"):
        keys.attempt(
            "cosine_min_lr_ratio", lambda: {"optim.min_lr_ratio": to.number(keys.given["cosine_min_lr_ratio"])}
        )
    arguments = keys.given.get("lr_scheduler_kwargs")
    if isinstance(arguments, dict) and arguments:
        keys.attempt("lr_scheduler_kwargs", lambda: _least(arguments, keys.settings.get("optim.lr") or 1.0))


def _least(arguments: Mapping[str, Any], lr: float) -> dict[str, Any]:
    if other := [name for name in arguments if name not in ("min_lr", "min_lr_rate", "num_warmup_steps")]:
        raise Inconvertible(f"{other[0]}: schedules have optim.warmup_steps and optim.min_lr_ratio alone.")
    if "min_lr_rate" in arguments:
        return {"optim.min_lr_ratio": to.number(arguments["min_lr_rate"])}
    return {"optim.min_lr_ratio": to.number(arguments["min_lr"]) / lr} if "min_lr" in arguments else {}


def evaluation(keys: Keys) -> None:
    """`eval.every`: peers count steps, shares of all steps, or epochs."""
    by_epoch = "eval.every is a number of steps; without it the end is evaluated. `capstan plan` counts steps."
    for name in ("eval_strategy", "evaluation_strategy"):
        if keys.given.get(name) == "epoch":
            keys.lose(name, by_epoch)
    if keys.given.get("evals_per_epoch"):
        keys.lose("evals_per_epoch", by_epoch)
    off = "no" in (keys.given.get("eval_strategy"), keys.given.get("evaluation_strategy"))
    if keys.given.get("eval_steps") and not off:
        keys.attempt("eval_steps", lambda: {"eval.every": to.steps(keys.given["eval_steps"])})


def saving(keys: Keys) -> None:
    """`checkpoint.every_steps` and `keep_best`."""
    by_time = (
        "checkpoint.every_steps is a number of steps: commits are made every 100 steps and every 30 minutes by default."
    )
    if keys.given.get("save_strategy") == "epoch":
        keys.lose("save_strategy", by_time)
    if keys.given.get("saves_per_epoch"):
        keys.lose("saves_per_epoch", by_time)
    if keys.given.get("save_strategy") == "no":
        keys.put("checkpoint.every_steps", 0, "save_strategy")
    elif keys.given.get("save_steps"):
        keys.attempt("save_steps", lambda: {"checkpoint.every_steps": to.steps(keys.given["save_steps"])})
    if keys.asked("load_best_model_at_end"):
        keys.put("checkpoint.keep_best", 1, "load_best_model_at_end")


def offloading(keys: Keys, folder: Path) -> None:
    """`sharding.deepspeed`, from a DeepSpeed configuration (a path or its content) and FSDP's."""
    given = keys.given.get("deepspeed")
    content = {
        name.removeprefix("deepspeed."): value for name, value in keys.given.items() if name.startswith("deepspeed.")
    }
    if given or content:
        keys.attempt("deepspeed", lambda: to.offload(_deepspeed(given or content, folder)))
    for name in (
        "fsdp_config",
        "fsdp_config.offload_params",
        "fsdp_config.fsdp_offload_params",
        "fsdp",
        "fsdp_cpu_offload",
    ):
        value = keys.given.get(name)
        inside = value.get("offload_params", value.get("fsdp_offload_params")) if isinstance(value, dict) else value
        if str(inside).lower() == "true" or (name == "fsdp" and "offload" in str(value)):
            keys.put("sharding.deepspeed", "zero3_offload_cpu", name)


def _deepspeed(given: Any, folder: Path) -> Any:
    """The content of a DeepSpeed configuration where its file is at hand, else what was given."""
    found = [place for place in (folder / str(given), Path(str(given))) if isinstance(given, str) and place.is_file()]
    try:
        return read_yaml(found[0].read_text(), given) if found else given
    except (OSError, ValueError, ConfigError):
        return given


def tracking(keys: Keys, services: Mapping[str, Sequence[str]], names: Sequence[str], projects: Sequence[str]) -> None:
    """`track.trackers`, and what the run and its project are called there. `services`: the keys that ask for each service."""
    asked = list(keys.settings.get("track.trackers", []))
    for service, switches in services.items():
        used = [switch for switch in switches if keys.asked(switch)]
        if used and keys.given.get(f"use_{service}") is not False:
            asked += [service] if service not in asked else []
            keys.put("track.trackers", asked, *used)
    for setting, candidates in (("track.name", names), ("track.project", projects)):
        key = next((name for name in candidates if keys.given.get(name)), None)
        if key:
            keys.put(setting, str(keys.given[key])[:100], key)


def training_arguments(keys: Keys, folder: Path) -> None:
    """All of the above, for peers that take transformers' `TrainingArguments`."""
    duration(keys)
    betas(keys)
    least_rate(keys)
    evaluation(keys)
    saving(keys)
    offloading(keys, folder)
    if "optim.warmup_steps" in keys.settings and "optim.warmup_ratio" in keys.settings:
        if keys.settings["optim.warmup_steps"]:
            keys.spare("optim.warmup_ratio", "Steps of warm-up are given, which go before a ratio.")
        else:
            keys.spare("optim.warmup_steps", "0 steps of warm-up leave it to the ratio.")
