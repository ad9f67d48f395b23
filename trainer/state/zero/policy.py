"""Builds one complete DeepSpeed dictionary from a DeepSpeed policy file and the run's configuration.

A policy is plain DeepSpeed JSON that says how the model is divided and moved: ZeRO's buckets, offload, communication
types. A key that the run's configuration decides (batch, optimizer, precision, clipping) is refused in a policy, with
the name of the setting that owns it: a value that stood in two places could differ. "auto", as Hugging Face writes it,
means "not decided here", so such a key counts as absent and none reaches DeepSpeed.
"""

import difflib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from trainer.config import Config
from trainer.config.paths import check_file, local_path
from trainer.errors import ConfigError, shown

Scope = Literal["world", "node"]
"""Over which ranks one copy of the base is divided: all of them, or those of each node."""

# ds_configs lies beside the trainer package, in a checkout and in site-packages.
_POLICY_FOLDER = Path(__file__).resolve().parents[3] / "ds_configs"

# DeepSpeed prints a line of its own every so many steps; ours come from trainer/run/metrics.py.
_NEVER = 2**31 - 1

WHOLE = 100_000
"""Elements of a parameter that is too small to be worth a gather."""
_THRESHOLD = "stage3_param_persistence_threshold"
_EVERYTHING = 2**62


def policy_names() -> list[str]:
    """Names of the policies in ds_configs, sorted."""
    return sorted(path.stem for path in _POLICY_FOLDER.glob("*.json"))


def choose_policy(config: Config, world_size: int, on_gpu: bool) -> str:
    """`sharding.deepspeed` with auto resolved: cpu without GPUs, single_gpu for one rank, else zero3."""
    if config.sharding.deepspeed != "auto":
        return config.sharding.deepspeed
    if not on_gpu:
        return "cpu"
    return "single_gpu" if world_size == 1 else "zero3"


def build_deepspeed_config(
    config: Config, world_size: int, accumulation: int, on_gpu: bool, whole: int = WHOLE
) -> dict[str, Any]:
    """Everything that `deepspeed.initialize(config=...)` needs, complete and without any "auto".

    Args:
        world_size: ranks in the run.
        accumulation: micro-batches each rank takes through the model in one optimizer step.
        on_gpu: whether the ranks compute on GPUs; it decides only what `sharding.deepspeed: auto` means.
        whole: parameters of so many elements stay whole on every rank, where the policy does not say.

    The optimizer is handed to DeepSpeed as an object, so the dictionary names none.

    Raises:
        ConfigError: there is no such policy, it is not JSON, or it sets what it must not.
    """
    policy = _load_policy(choose_policy(config, world_size, on_gpu))
    zero = {_THRESHOLD: whole, **policy.pop("zero_optimization", {}), "stage": 3}
    if world_size == 1 and not is_offloaded(zero):
        # With one rank a partition is the parameter, so nothing is ever gathered or waited for.
        zero[_THRESHOLD] = _EVERYTHING
    return {
        # DeepSpeed's own clock waits for the device before and after each micro-batch.
        "timers": {"throughput": {"enabled": False}},
        **policy,
        "zero_optimization": zero,
        # To DeepSpeed a micro-batch counts as one, however many packed rows train.micro_batch puts into it.
        "train_batch_size": world_size * accumulation,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.grad_clip,
        "bf16": {"enabled": config.model.dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
        # Without this an offload_optimizer in the policy would demand DeepSpeed's own CPU Adam.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": _NEVER,
    }


def is_offloaded(zero: dict[str, Any]) -> bool:
    """Whether the policy's section `zero_optimization` keeps the partitions of parameters in host memory."""
    return zero.get("offload_param", {}).get("device", "none") != "none"


def _load_policy(name: str) -> dict[str, Any]:
    path = _find_policy(name)
    try:
        check_file(path)
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"sharding.deepspeed: {name} cannot be read: {error}.") from error
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"sharding.deepspeed: {name}, line {error.lineno}, column {error.colno} is not JSON: {error.msg}."
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f'sharding.deepspeed: {name} is not a JSON object. Example: {{"zero_optimization": {{...}}}}.'
        )
    policy = _without_auto(cast(dict[str, Any], tree))
    refusals = _refusals(policy, path.name)
    if refusals:
        raise ConfigError("\n".join(refusals))
    return policy


def _find_policy(name: str) -> Path:
    if name in policy_names():
        return _POLICY_FOLDER / f"{name}.json"
    own = local_path(name, "sharding.deepspeed")
    if own.is_file():
        return own
    raise ConfigError(
        f"sharding.deepspeed: {shown(name)} is neither a file nor a policy's name. "
        f"Allowed are auto, {', '.join(policy_names())}, or the path of your own DeepSpeed JSON."
    )


def _without_auto(tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` without keys whose value is "auto", and without sections that held nothing else."""
    kept: dict[str, Any] = {}
    for key, value in tree.items():
        if value == "auto":
            continue
        if isinstance(value, dict) and value:
            value = _without_auto(cast(dict[str, Any], value))
            if not value:
                continue
        kept[key] = value
    return kept


@cache
def _rules() -> dict[str, Any]:
    """The keys that a policy may set, those that a setting of the run owns, and the values that are refused. A plan
    asks again and again.
    """
    return yaml.safe_load(Path(__file__).with_name("policy_keys.yaml").read_text(encoding="utf-8"))


def _refusals(policy: dict[str, Any], file: str) -> list[str]:
    """One sentence for each key that a policy must not set, and for each value that a key must not have."""
    rules = _rules()
    where, owners = f"sharding.deepspeed: {file} sets", rules["owners"]
    allowed: list[str] = rules["allowed"]
    found: list[str] = []
    for key in policy:
        if key not in owners and key not in allowed:
            close = difflib.get_close_matches(key, allowed, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Allowed are {', '.join(allowed)}."
            found.append(f"{where} {key}, which would have no effect. {hint}")
    zero = policy.get("zero_optimization", {})
    if not isinstance(zero, dict):
        found.append(f"{where} zero_optimization to {zero!r}. It must be an object with DeepSpeed's ZeRO settings.")
    given = dict(_leaves(policy))
    for key, owner in owners.items():
        if any(f"{name}.".startswith(f"{key}.") for name in given):
            found.append(f"{where} {key}, which belongs to {owner}. Remove it there.")
    for key, rule in rules["values"].items():
        if key in given and (given[key] in rule.get("not", ()) or given[key] != rule.get("only", given[key])):
            found.append(f"{where} {key} to {given[key]!r}{rule['why']}")
    return found


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a policy that is not a non-empty section, by its dotted key."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(cast(dict[str, Any], value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
