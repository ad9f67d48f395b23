"""Values of peers as values of ours. Each function raises `Inconvertible` for a value that has no counterpart."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from trainer.config.model import SCALINGS
from trainer.config.run import SHARED_FOLDERS

Conversion = Callable[[Any], Any]
_LARGEST = 2**32


class Inconvertible(ValueError):
    """The value has no counterpart among our settings; the text is a sentence that says why, and what holds instead."""


@cache
def words(table: str) -> dict[str, Any]:
    """Our word for each of the peers' in a table of words.yaml."""
    tables = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))
    return {name: ours for ours, theirs in tables[table].items() for name in theirs.split()}


def text(value: Any) -> str:
    """A text, such as a path."""
    if not isinstance(value, str) or not value.strip():
        raise Inconvertible(f"{value!r} is no text.")
    return value


def number(value: Any) -> float:
    """A number, even if YAML 1.1 takes it for text, such as `2e-4`."""
    try:
        given = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise Inconvertible(f"{value!r} is no number.") from error
    if not abs(given) <= _LARGEST:
        raise Inconvertible(f"{value!r} is no number that a setting could have.")
    return given


def whole(value: Any) -> int:
    """A whole number."""
    if (given := number(value)) != int(given):
        raise Inconvertible(f"{value!r} is no whole number.")
    return int(given)


def kept(value: Any) -> dict[str, Any]:
    """How many checkpoints are kept; peers take 0 and -1 for all of them."""
    given = whole(value)
    return {"checkpoint.keep_last": given} if given > 0 else {"checkpoint.keep_every": 1}


def pair(value: Any) -> list[float]:
    """Two numbers."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise Inconvertible(f"{value!r} are no two numbers.")
    return [number(item) for item in value]


def passes(value: Any) -> int | float:
    """Epochs, as a whole number if they are one."""
    given = number(value)
    return int(given) if given == int(given) else given


def flag(value: Any) -> bool:
    """True or false, also as the text that command lines give."""
    if isinstance(value, str):
        if value.lower() not in ("true", "false", "1", "0", "yes", "no", "auto"):
            raise Inconvertible(f"{value!r} is neither true nor false.")
        return value.lower() in ("true", "1", "yes", "auto")
    return bool(value)


def switched(value: Any) -> bool:
    """True or false. Any other word says how it is done, and counts as true."""
    return value if isinstance(value, bool) else str(value).lower() not in ("false", "0", "no", "")


def names(value: Any) -> list[str]:
    """A list of names, also from a text with commas or blanks between them."""
    if isinstance(value, str):
        return value.replace(",", " ").split()
    return [str(name) for name in value] if isinstance(value, list | tuple | dict) else [str(value)]


def named(value: Any) -> bool:
    """True if something is named."""
    return bool(value)


def when(on: Mapping[str, Any], off: Mapping[str, Any] | None = None) -> Callable[[Any], dict[str, Any]]:
    """The settings that follow from a key that is true, or those that follow from false."""
    return lambda value: dict(on if flag(value) else off or {})


def one_of(allowed: Mapping[str, Any], otherwise: str) -> Callable[[Any], Any]:
    """A choice among names. The last part of a name counts, as in torch.bfloat16. `otherwise` says what holds for other
    names.
    """

    def convert(value: Any) -> Any:
        name = str(value).lower().rpartition(".")[2]
        if name not in allowed:
            raise Inconvertible(f"{value!r} does not exist here: {otherwise}")
        return allowed[name]

    return convert


def rope_scaling(value: Any) -> dict[str, Any]:
    """A scaling of rotary positions, as in config.json. A name alone is refused: its factor would follow from the base
    and the rows.
    """
    if not isinstance(value, dict):
        raise Inconvertible(f"{value!r} names no factor. Set model.rope_scaling, whose factor `capstan plan` gives.")
    kind = value.get("rope_type", value.get("type"))
    if kind not in SCALINGS:
        *most, last = SCALINGS
        raise Inconvertible(f"{kind!r} does not exist here: rope_type is {', '.join(most)} or {last}.")
    given = {"rope_type": kind, **{name: part for name, part in value.items() if name not in ("type", "rope_type")}}
    return {f"model.rope_scaling.{name}": part for name, part in given.items()}


def steps(value: Any) -> int:
    """A number of steps. Peers also take a share of all steps."""
    if isinstance(value, str) and not value.replace(".", "").replace("e", "").replace("-", "").isdigit():
        raise Inconvertible(f"{value!r} is no number of steps.")
    if 0 < (given := number(value)) < 1:
        raise Inconvertible(f"{value} is a share of all steps. Count them with `capstan plan`, and set their number.")
    return max(0, int(given))


def warmup(value: Any) -> dict[str, Any]:
    """Steps, or a share of all steps below 1."""
    given = number(value)
    return {"optim.warmup_ratio": given} if 0 < given < 1 else {"optim.warmup_steps": whole(value)}


def warmup_ratio(value: Any) -> dict[str, Any]:
    """A share of all steps; 0 is no warm-up."""
    return {"optim.warmup_ratio": number(value)} if number(value) else {}


def schedule(value: Any) -> dict[str, Any]:
    """The schedule of the learning rate. Those of the peers end at 0."""
    known = {name: {"optim.schedule": ours} for name, ours in words("schedules").items()}
    for name, ours in words("schedules_to_zero").items():
        known[name] = {"optim.schedule": ours, "optim.min_lr_ratio": 0.0}
    otherwise = "docs/configuration.md lists those of optim.schedule. Left at cosine."
    return one_of(known, otherwise)(getattr(value, "value", value))


def optimizer(value: Any) -> str:
    """The optimizer with the same update, whatever its implementation."""
    return one_of(
        words("optimizers"), "optim.name is adam, adamw, adamw_8bit, adafactor, lion or muon. Left at adamw."
    )(value)


def attention(value: Any) -> dict[str, Any]:
    """The attention kernel. Kernels of others are left to model.attention: auto, which takes the fastest that can
    run.
    """
    kernel = words("attention").get(str(value).lower())
    return {"model.attention": kernel} if kernel else {}


def dtype(value: Any) -> str:
    """The type of activations."""
    return one_of(words("dtypes"), "model.dtype is bf16 or fp32. Left at bf16.")(value)


def targets(value: Any) -> str | list[str]:
    """The layers that get adapters: names, or all linear ones."""
    if str(value) in ("all", "all-linear", "all_linear", "['all-linear']"):  # a command line makes a list of it
        return "all-linear"
    if isinstance(value, str) and any(sign in value for sign in "\\[](|^$*?"):
        return [f"re:{value}"]
    return names(value)


def layers(value: Any) -> list[int]:
    """A range of decoder layers, from a list of their numbers or a single one."""
    numbers = sorted(whole(item) for item in (value if isinstance(value, list) else names(value)))
    if not numbers or numbers != list(range(numbers[0], numbers[-1] + 1)):
        raise Inconvertible(
            "tuning.layers is one range of layers. Name these in tuning.targets, such as 're:.*layers[.](0|5)[.].*'."
        )
    return [numbers[0], numbers[-1] + 1]


def adapter(value: Any) -> str:
    """The place of an adapter; a name without a slash would be one of our runs."""
    place = text(value)
    if "," in place:
        raise Inconvertible("several adapters. tuning.start begins from one; merge them first.")
    return place if "/" in place else f"./{place}"


def offload(value: Any) -> dict[str, Any]:
    """Return the settings for what a DeepSpeed configuration keeps in the host's memory. `value` is its content or its
    path. If the file is not here, the name in the path tells."""
    if isinstance(value, str):
        name = PurePosixPath(value).name.lower()
        base = "offload" in name and "opt" not in name.replace("without_opt", "")
        return {"sharding.deepspeed": "zero3_offload_cpu"} if base else {}
    zero = value.get("zero_optimization") if isinstance(value, dict) else None
    parts = {part: zero.get(f"offload_{part}") for part in ("param", "optimizer")} if isinstance(zero, dict) else {}
    moved = [
        part for part, given in parts.items() if isinstance(given, dict) and given.get("device") in ("cpu", "nvme")
    ]
    policy = {"param": "zero3_offload_cpu", "optimizer": "zero3_offload_optimizer"}
    return {"sharding.deepspeed": policy[moved[0]]} if moved else {}


def run_folder(value: Any) -> dict[str, Any]:
    """The folder of a run: its last part is the run's name, the others are the store."""
    parts = [part for part in str(value).split("/") if part not in ("", ".")]
    name = "".join(sign if sign.isalnum() or sign in "._-" else "-" for sign in (parts or ["run"])[-1])
    name = name.lstrip("._-") or "run"
    given = {"run.name": f"{name}-run" if name in SHARED_FOLDERS else name[:100]}
    root = "/" if str(value).startswith("/") else ""
    return {**given, "run.store": root + "/".join(parts[:-1])} if len(parts) > 1 else given


def trackers(value: Any) -> dict[str, Any]:
    """`report_to`: names of services."""
    asked = [name for name in names(value) if name not in ("none", "tensorboard", "all")]
    known = [name for name in asked if name in ("wandb", "mlflow", "trackio")]
    if other := [name for name in asked if name not in known]:
        raise Inconvertible(f"{other[0]}: track.trackers are wandb, mlflow and trackio; TensorBoard is always written.")
    return {"track.trackers": known} if known else {}


def held_out(value: Any) -> float | int:
    """The rows to evaluate on: their share, or from 1 on their number."""
    if (given := number(value)) < 1:
        return given
    if given % 1:
        raise Inconvertible(f"{value}: data.held_out is a share of the rows below 1, or a whole number of them.")
    return int(given)


def share_held_out(value: Any) -> float:
    """The share of rows to evaluate on, of a peer that takes no number of them."""
    if (given := number(value)) >= 1:
        raise Inconvertible(f"{value}: is a share there, and 1 or more leaves nothing to train on. Give one below 1.")
    return given
