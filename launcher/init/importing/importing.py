"""One import: it reads a peer's files, and writes a configuration of ours and a table of what became of every key."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

from launcher.init.commented import yaml_text
from launcher.init.importing.command_line import ALONE, COMPUTED, LAUNCHER, PROGRAM, VARIABLES, is_unset
from launcher.init.importing.mapping import Keys, Outcome, Status
from launcher.init.importing.reading import ROWS, detect, marked, read_peer_file, refuse_others
from launcher.view.console import FoldedTable
from trainer.config import parse_config
from trainer.config.peers.conversions import Inconvertible
from trainer.config.peers.table import PEERS, Peer, To, Together
from trainer.errors import ConfigError, shown
from trainer.state.optimizer import find_optimizer
from trainer.tuning.method import method_of
from trainer.tuning.objective import find_objective

JOINS: Mapping[str, tuple[Peer, Callable[[Keys], None]]] = {
    peer.name: (peer, import_module(f"launcher.init.importing.{peer.name.replace('-', '_')}").join) for peer in PEERS
}
"""The peers whose files are read, by the names that `--from` takes."""
_LAUNCHER = JOINS["accelerate"][0]  # says where something runs, beside the file of another peer
# Words in unknown keys: of parameters that learn or do not, and of adapters.
_FREEZES, _ADAPTS = re.compile(r"fr[eo]+ze|trainable"), re.compile(r"lora|peft|adapter")
_SETTING = re.compile(r"([a-z_]+(?:\.[a-z_]+)+)")
# A configuration needs all of these. The file is written with these values in their places, and the table says so.
_FILL_IN: Mapping[str, tuple[Any, str]] = {
    "run.name": ("imported", "a name for the run"),
    "model.base": ("FILL-IN", "the base: a directory, a bucket's URI or a Hub id"),
    "data.train": ([{"path": "FILL-IN"}], "the training data"),
    "train.epochs": (1, "how long to train"),
}


@dataclass(frozen=True)
class Imported:
    """A configuration of ours, what became of each key, and what is left to do by hand.

    The configuration is there as text, and as settings by their dotted names.
    """

    peers: tuple[str, ...]
    text: str
    settings: dict[str, Any]
    keys: tuple[Outcome, ...]
    to_do: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "from": list(self.peers),
            "config": self.text,
            "settings": self.settings,
            "keys": [{"from": (found := asdict(outcome)).pop("peer"), **found} for outcome in self.keys],
            "to_do": list(self.to_do),
        }

    def table(self) -> FoldedTable:
        """Return the table, a line for each key.

        Lost keys come first. Keys that are not needed for the same reason share a line.
        """

        def place(outcome: Outcome) -> tuple[int, str]:
            order = ("not supported", "unknown", "mapped", "not needed")
            return order.index(outcome.status), outcome.why if outcome.status == "not needed" else ""

        table = FoldedTable(" and ".join(self.peers), "here")
        for _, group in groupby(sorted(self.keys, key=place), key=lambda found: place(found)[1] or found.key):
            outcomes = list(group)
            first = outcomes[0]
            made = "\n".join(f"{name}: {_short(value)}" for name, value in first.settings.items())
            keys = ", ".join(outcome.key for outcome in outcomes)
            theirs = f"{keys}: {_short(first.value)}" if len(outcomes) == 1 else keys
            ours = (made, first.why) if made else (f"{first.status}: {first.why}",)
            table.add_row(theirs, "\n".join(filter(None, ours)))
        return table

    def sentence(self) -> str:
        statuses = [outcome.status for outcome in self.keys]
        counts = (f"{statuses.count(status)} {status}" for status in get_args(Status))
        return f"{len(self.keys)} keys of {' and '.join(self.peers)}: {', '.join(counts)}"


def import_files(
    paths: Sequence[str | Path], peer: str | None = None, gpus: int | None = None, data_info: Path | None = None
) -> Imported:
    """Carry the configurations in `paths` over. Several make one, such as TRL's and accelerate's.

    Args:
        peer: the tool of the first file; None finds it out by the keys.
        gpus: how many GPUs the peer's run was on, on which its batch depends.
        data_info: LLaMA-Factory's dataset_info.json, if it is not where the file says.

    Raises:
        ConfigError: a file cannot be read, or no peer knows its keys.
    """
    if peer is not None and peer not in JOINS:
        raise ConfigError(f"--from: {shown(peer)} is not known. Allowed are {', '.join(JOINS)}.")
    settings: dict[str, Any] = {}
    origins: dict[str, list[str]] = {}
    if gpus:
        settings["cluster.workers"], origins["cluster.workers"] = gpus, [f"--gpus {gpus}"]
    files = [_keys(Path(path), peer if not index else None, settings, origins) for index, path in enumerate(paths)]
    launched = [found for keys in files if (found := _launched_by(keys, settings, origins))]
    files, paths = [*files, *launched], [*paths, *(keys.path for keys in launched)]
    for keys in files:
        keys.data_info = data_info
    if data_info is not None and not any(keys.peer.tables.get("public_sets") for keys in files):
        raise ConfigError(
            f"--data-info: {files[0].peer.title} has no dataset_info.json, which is LLaMA-Factory's. Leave it out."
        )
    if sum(keys.peer is not _LAUNCHER for keys in files) > 1:
        raise ConfigError(
            "More than one of the files describes a training. Give one of these, and accelerate's file if there is one."
        )
    # The place where the run computes is settled first, because the batch depends on it.
    for keys in sorted(files, key=lambda keys: keys.peer is not _LAUNCHER):
        keys.convert()
        try:
            JOINS[keys.peer.name][1](keys)
        except Inconvertible as error:
            raise ConfigError(
                f"{keys.path}: a value cannot be read: {error} Correct it. Nothing was written."
            ) from error
        keys.refuse()
    for path, keys in zip(paths, files, strict=True):
        _refuse_unknown(path, keys, full=settings.get("tuning.method") == "full")
    if settings.get("tuning.method") == "full" and settings.get("sharding.deepspeed") == "zero3_offload_cpu":
        settings["sharding.deepspeed"] = "zero3_offload_optimizer"  # what learns has its masters and moments there too
    to_do = [line for keys in files for line in keys.to_do]
    to_do += _completed(settings, origins)
    to_do += _valid(settings, files)
    to_do += _unowned(settings)
    if "cluster.workers" not in settings and not any(map(_declares_the_batch, files)):
        to_do.append("train.global_batch: counted for one GPU, as the file names no number. --gpus N counts for N.")
    outcomes = tuple(outcome for keys in files for outcome in keys.outcomes())
    names = tuple(dict.fromkeys(keys.peer.title for keys in files))
    text = _text(settings, origins, names, paths, outcomes, to_do)
    return Imported(names, text, settings, outcomes, tuple(to_do))


def _launched_by(keys: Keys, settings: dict[str, Any], origins: dict[str, list[str]]) -> Keys | None:
    """Return the keys of accelerate's file that a command line names, if it is here. The command's own come first."""
    named = keys.given.get("config_file")
    place = next((place for place in keys.places(str(named)) if place.is_file()), None) if named else None
    if place is None or keys.peer is _LAUNCHER:
        return None
    tree = {name: value for name, value in read_peer_file(place).items() if name not in keys.tree}
    return Keys(place, _LAUNCHER, tree, settings, origins) if tree else None


def _declares_the_batch(keys: Keys) -> bool:
    """Return whether a key is the batch of all devices."""
    rows = (keys.row(key) for key, value in keys.given.items() if value is not None)
    return any(isinstance(row, To) and row.setting == "train.global_batch" for row in rows)


def _refuse_unknown(path: str | Path, keys: Keys, full: bool) -> None:
    """Refuse a file with mostly unknown keys, which belongs to another tool than it was taken for; and one with an
    unknown key that may say what learns."""
    outcomes = keys.outcomes()
    unknown = [outcome.key for outcome in outcomes if outcome.status == "unknown"]
    for key in filter(keys.asked, unknown):
        if _FREEZES.search(key) or (_ADAPTS.search(key) and (full or "use_" in key)):
            raise ConfigError(
                f"{path}: {key}: {_short(keys.given[key])}: this is no key of {keys.peer.title}'s, and by its name it"
                " says what learns. The import does not guess. Remove it, and say what learns by a key of"
                f" {keys.peer.title}'s. Nothing was written."
            )
    if 2 * len(unknown) > len(outcomes):
        raise ConfigError(
            f"{path}: {len(unknown)} of its {len(outcomes)} keys are none of {keys.peer.title}'s, such as"
            f" {', '.join(unknown[:3])}. It is a file of another tool, or of another version. Nothing was written."
        )


def _unowned(settings: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each data set that is named without its owner, as some on the Hub once were."""
    sources = [source for name in ("data.train", "data.eval") for source in settings.get(name) or ()]
    names = dict.fromkeys(str(source["path"]) for source in sources)
    return [
        f"data.train: {name} is no file here. Where it is a data set of the Hub, write hf://OWNER/{name}."
        for name in names
        if re.fullmatch(r"[\w-]+", name) and name != "FILL-IN" and not Path(name).exists()
    ]


def _keys(path: Path, peer: str | None, settings: dict[str, Any], origins: dict[str, list[str]]) -> Keys:
    tree = read_peer_file(path)
    computed = tree.pop(COMPUTED, [])
    program = tree.pop(PROGRAM, None)
    variables, rows = tree.pop(VARIABLES, {}), tree.pop(ROWS, [])
    launcher, alone = tree.pop(LAUNCHER, []), tree.pop(ALONE, False)
    if peer is None:
        refuse_others(tree, program, str(path))
    known = [one for one, _ in JOINS.values()]
    by_program = next((one.name for one in known if program in one.tables.get("programs", "").split()), None)
    own = {key: value for key, value in tree.items() if key not in launcher}
    # A command that runs a script of Python's with options alone is one of TRL's, unless a key is another tool's alone.
    by_script = "trl" if path.suffix in (".py", ".ipynb") or (alone and not marked(own, known)) else None
    peer = peer or by_program or by_script
    found = JOINS[peer][0] if peer else detect(own, known, str(path))
    tree = dict(_as_called(key, value, found) for key, value in tree.items() if key in own or found.row(key))
    keys = Keys(path, found, tree, settings, origins)
    of_script = path.suffix in (".py", ".ipynb")  # its calls say what is trained
    keys.variables, keys.rows = variables, rows
    keys.program, keys.name = program or "", "" if of_script else path.stem
    for key, value in [*keys.given.items()]:
        if is_unset(value) and isinstance(keys.row(key), To | Together):
            keys.leave_open(key)
            keys.to_do.append(f"{key}: {_short(value)}: the file does not say what this is. Give the value.")
    keys.to_do += computed
    return keys


def _as_called(key: str, value: Any, peer: Peer) -> tuple[str, Any]:
    """Return a flag such as `--no_save_optim` under its whole name, if that is the peer's."""
    whole = f"no_{key}"
    return (whole, True) if value is False and peer.row(key) is None and peer.row(whole) else (key, value)


def _completed(settings: dict[str, Any], origins: dict[str, list[str]]) -> list[str]:
    """Give a value to the settings that have none and need one.

    Returns a sentence for each that the user has to fill in.
    """
    found: list[str] = []
    for name, (value, what) in _FILL_IN.items():
        if name in settings or (name == "train.epochs" and "train.steps" in settings):
            continue
        settings[name], origins[name] = value, ["to be filled in"]
        found.append(f"{name}: not in the file. Fill in {what}.")
    return found


def _valid(settings: dict[str, Any], files: Sequence[Keys]) -> list[str]:
    """Remove the settings that our own checks refuse, with their sentence as the reason.

    Returns what the user has to do.
    """
    to_do: list[str] = []
    while True:  # a check that refuses one setting may hide another
        try:
            config = parse_config(yaml_text(settings, {}, ()))
            for check in (method_of, find_objective):
                check(config)
            find_optimizer(config.optim)
            return to_do
        except ConfigError as error:
            refused = {_named(line, settings): line for line in str(error).splitlines()}
            wrong = [name for name in refused if name in settings and settings[name] != _FILL_IN.get(name, (None,))[0]]
            if not wrong:
                return [*to_do, *str(error).splitlines()]
            if "tuning.method" in wrong and settings["tuning.method"] == "full":
                raise ConfigError(
                    f"{refused['tuning.method']} The file trains the whole base, and an import makes no other training"
                    " of it. Nothing was written."
                ) from error
            for setting in wrong:
                settings.pop(setting)
                said = [keys.drop(setting, refused[setting]) for keys in files]
                if setting in _FILL_IN:
                    settings[setting] = _FILL_IN[setting][0]
                    to_do.append(f"{refused[setting]} Now it is {settings[setting]}.")
                elif not any(said):  # no key asked for it, as for the base itself to learn where there is no adapter
                    to_do.append(f"{refused[setting]} It is left out.")


def _named(line: str, settings: Mapping[str, Any]) -> str:
    """Return the setting that a sentence of ours begins with, or the one that contains it."""
    found = _SETTING.match(line)
    parts = found[1].split(".") if found else []
    prefixes = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in settings), "")


def _text(
    settings: dict[str, Any],
    origins: Mapping[str, Sequence[str]],
    peers: Sequence[str],
    paths: Sequence[str | Path],
    outcomes: Sequence[Outcome],
    to_do: Sequence[str],
) -> str:
    head = [
        f"Imported from {' and '.join(str(path) for path in paths)} ({' and '.join(peers)}). Behind each setting is"
        " what it comes from."
    ]
    head += [f"To do: {line}" for line in to_do]
    lost = [outcome for outcome in outcomes if outcome.status in ("not supported", "unknown")]
    foot = ["", "Not carried over:"] if lost else []
    foot += [f"  {outcome.key}: {_short(outcome.value)}   {outcome.why}" for outcome in lost]
    return yaml_text(settings, origins, head, foot)


def _short(value: Any) -> str:
    text = "null" if value is None else " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
