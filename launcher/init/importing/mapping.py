"""The keys of a peer's file, the settings that they make together, and each key's outcome."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.init.importing.reading import flat_keys
from trainer.config.peers import conversions as to
from trainer.config.peers.conversions import Conversion, Inconvertible
from trainer.config.peers.table import OFF, Needless, Peer, RefusedKey, Row, To, Unsupported
from trainer.errors import ConfigError

_SECRET = re.compile(r"hub_token|(^|_)(api_key|secret|password|webhook_url)$")
MEDIA = "images, video or sound"
Status = Literal["mapped", "not needed", "not supported", "unknown"]


@dataclass(frozen=True)
class Outcome:
    """A key, its value, and what became of it: its settings, or why it made none. `peer` is the tool's name."""

    peer: str
    key: str
    value: Any
    status: Status
    settings: dict[str, Any]
    why: str


class Keys:
    """The keys of one file and the settings that they have made so far.

    All files of one import share `settings`, and `origins`, the keys that each setting comes from. `to_do` are
    sentences about what only the user can fill in.
    """

    def __init__(
        self, path: Path, peer: Peer, tree: dict[str, Any], settings: dict[str, Any], origins: dict[str, list[str]]
    ) -> None:
        self.path, self.folder = path, path.parent
        self.name = ""  # the file's own, if it may say what is trained
        self.program = ""  # the tool's own, on whose command line the keys are
        self.variables: dict[str, str] = {}  # of the environment, that a command line or its script sets
        self.rows: list[dict[str, Any]] = []  # what a script makes of its rows, as parts of a source for each data set
        self.peer = peer
        self.tree = tree
        nulls = peer.tables.get("nulls", "").split()
        self.given = {key: None if value in nulls else value for key, value in flat_keys(tree, peer)}
        self.settings = settings
        self.origins = origins
        self.to_do: list[str] = []
        self.data_info: Path | None = None  # LLaMA-Factory's file of data sets, if it is named separately
        # These are by key: the settings that it made; why it is lost; what differs although it is carried over; why it
        # is not needed.
        self._made: dict[str, list[str]] = {}
        self._lost: dict[str, str] = {}
        self._notes: dict[str, str] = {}
        self._spared: dict[str, str] = {}
        self._open: dict[str, Any] = {}  # what the file leaves to the shell or the environment

    def row(self, key: str) -> Row | None:
        return self.peer.row(re.sub(r"\[\d+\]", "[]", key))

    def rows_of(self, data_set: int) -> dict[str, Any]:
        """Return the parts of a source that a script makes of the rows of one of its data sets."""
        return self.rows[min(data_set, len(self.rows) - 1)] if self.rows else {}

    def places(self, path: str) -> list[Path]:
        """Return the places of a relative `path` that the file names: here, beside the file, and above it."""
        return [Path(path), *(above / path for above in (self.folder, *self.folder.absolute().parents))]

    def get(self, key: str) -> Any:
        """Return the given value, or the peer's default."""
        given = self.given.get(key)
        return self.peer.defaults.get(key) if given is None else given

    def asked(self, key: str) -> bool:
        """Return whether a switch is given and on."""
        return str(self.given.get(key) or "").lower() not in ("", "false", "0", "no", "none")

    def off(self, key: str) -> bool:
        """Return whether a strategy is `no`, which YAML reads as false where it has no quotes."""
        return self.given.get(key) in ("no", False)

    def whole(self, key: str, otherwise: int = 0) -> int:
        """Return a whole number, given or the peer's default; `otherwise` if there is none, or it cannot be read."""
        try:
            given = self.get(key)
            return otherwise if given is None else to.whole(given)
        except Inconvertible as error:
            self.lose(key, str(error))
            return otherwise

    def names(self, key: str) -> list[str]:
        """Return a given list of names."""
        return [] if self.given.get(key) in (None, "") else to.names(self.given[key])

    def put(self, setting: str, value: Any, *keys: str) -> None:
        """Set `setting`, which came from these keys."""
        self.settings[setting] = value
        shown = [f"{key}: {self.given[key]}" for key in keys if key in self.given]
        defaulted = [
            f"{self.peer.title}'s default of {key}"
            for key in keys
            if key not in self.given and key in self.peer.defaults
        ]
        self.origins[setting] = shown or defaulted
        for key in keys:
            self._made.setdefault(key, []).append(setting)

    def assume(self, setting: str, value: Any, why: str) -> None:
        """Set `setting` to what the peer does by itself."""
        self.settings[setting], self.origins[setting] = value, [why]

    def lose(self, key: str, why: str) -> None:
        """Record that the key is given and cannot be carried over as it is."""
        if key in self.given:
            self._lost.setdefault(key, why)

    def leave_open(self, key: str) -> None:
        """Record that the file does not say what the value of this given key is, and give it no more."""
        self.lose(key, "The file does not say what this is.")
        self._open[key] = self.given.pop(key)

    def note(self, key: str, what: str) -> None:
        """Record what differs although the key is carried over."""
        self._notes.setdefault(key, what)

    def convert(self) -> None:
        """Make the settings of all keys that need no other key, including those of defaults."""
        given = {key: value for key, value in self.given.items() if value is not None or key in self.peer.nullable}
        # Defaults come first. So if two keys make one setting, the given one counts, and of two given ones the later.
        for key, value in {**self.peer.defaults, **given}.items():
            row = self.row(key)
            if isinstance(row, To) and value is not None:
                self.attempt(key, lambda row=row, value=value: _settings(row, value))

    def refuse(self) -> None:
        """Raises `ConfigError` if a key makes the file another training than ours are."""
        for key, value in self.given.items():
            row = self.row(key)
            if isinstance(row, RefusedKey) and value not in OFF and str(value).lower() != "false":
                raise no_training(f"{key}: {value}", row.why)

    def attempt(self, key: str, make: Callable[[], dict[str, Any]]) -> None:
        """Put the settings that `make` returns, or note why there are none."""
        try:
            made = make()
        except Inconvertible as error:
            self.lose(key, str(error))
            return
        for setting, value in made.items():
            self.put(setting, value, key)

    def carry(self, key: str, setting: str, convert: Conversion) -> None:
        """Put the converted value of `key`, if it is given. Beside other keys it counts last."""
        if (value := self.given.get(key)) not in (None, ""):
            self.attempt(key, lambda: {setting: convert(value)})

    def drop(self, setting: str, why: str) -> bool:
        """Remove a setting that turned out not to hold. Returns whether a key is reported as lost.

        A key that made nothing else is reported as lost, because of `why`.
        """
        self.settings.pop(setting, None)
        before = len(self._lost)
        for key, made in self._made.items():
            if setting in made:
                made.remove(setting)
                if not made:
                    self.lose(key, why)
        return len(self._lost) > before

    def spare(self, setting: str, why: str) -> None:
        """Remove a setting that another one makes unnecessary."""
        self.settings.pop(setting, None)
        for key, made in self._made.items():
            if setting in made:
                self._spared[key] = why

    def need_not(self, key: str, why: str) -> None:
        """Record that the key is given, and that what it asks for holds without it."""
        self._spared[key] = why

    def outcomes(self) -> list[Outcome]:
        """Return the outcome of each key that has a value, in the file's order."""
        asked = {key: value for key, value in self.given.items() if value is not None or key in self.peer.nullable}
        return [self._outcome(key, value) for key, value in (asked | self._open).items()]

    def _outcome(self, key: str, value: Any) -> Outcome:
        row, made = self.row(key), self._made.get(key, [])
        settings = {setting: self.settings[setting] for setting in made if setting in self.settings}

        def became(status: Status, why: str) -> Outcome:
            shown = "(not shown)" if value and _SECRET.search(key) else value
            return Outcome(self.peer.name, key, shown, status, settings, why)

        if row is None:
            return became("unknown", f"Capstan does not know it as a key of {self.peer.title}.")
        if key in self._lost:
            return became("not supported", self._lost[key])
        if isinstance(row, Unsupported) and value not in row.idle:
            return became("not supported", row.why)
        if key in self._spared and not settings:
            return became("not needed", self._spared[key])
        if settings:
            return became("mapped", self._notes.get(key, ""))
        if isinstance(row, Needless):
            return became("not needed", row.why)
        if isinstance(row, Unsupported | RefusedKey) or value is None:
            return became("not needed", "With this value it asks for nothing.")
        return became("not needed", f"With this value it asks for nothing beyond what {row.setting} is already.")


def _settings(row: To, value: Any) -> dict[str, Any]:
    try:
        made = row.convert(value)
    except Inconvertible:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise Inconvertible(f"{value!r} is not a value that {row.setting} can be made of.") from error
    return made if isinstance(made, dict) else {row.setting: made}


def no_training(what: str, why: str = "") -> ConfigError:
    """Return the refusal of a file that would become another training than it is. `why` is a sentence."""
    said = why or (
        "docs/preference.md and docs/heads.md list those. docs/rollouts.md says how answers are sampled and rewarded"
        " here, and docs/pictures.md how rows with pictures are trained on. `capstan export` and `generate` merge and"
        " answer."
    )
    return ConfigError(f"{what}: this is no training that can be carried over. {said} Nothing was written.")


_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_FILE = re.compile(r"\.(jsonl?|csv|tsv|parquet|arrow|mds|txt|gz|zst|xz)$", re.IGNORECASE)
_FIRST = re.compile(r"(\w+)\[:(\d+)(%?)\]")  # the first rows of a split, as a number or in per cent
_BETWEEN = re.compile(r"(\w+)\[(\d+):(\d*)\]")  # its rows from a number on, and up to another one
_ON_HUB = re.compile(
    r"https://huggingface\.co/datasets/([\w.-]+/[\w.-]+)/(?:raw|resolve|blob)/([\w.-]+)/([^?]+)(?:\?.*)?"
)
_READERS = ("json", "csv", "parquet", "text", "arrow", "pandas")


def source_paths(path: str, files: Any = None, revision: str | None = None) -> list[str]:
    """Return where the rows are: a file, a folder, a bucket's URI, or `hf://owner/name` with its files.

    `path` may be a reader of `datasets`, such as json. Then its `files` are read.
    """
    if isinstance(files, dict):
        files = files.get("train") or next(iter(files.values()), None)
    listed = [files] if isinstance(files, str) else [str(name) for name in files] if isinstance(files, list) else []
    if path in _READERS and listed:
        listed = [_of_address(name) for name in listed]
        return [name.removeprefix("file://") for name in listed]
    if is_hub_dataset(path):
        base = f"hf://{path}{f'@{revision}' if revision else ''}"
        return [f"{base}/{name}" for name in listed] or [base]
    if listed:
        return [name if name.startswith(("/", "s3://", "hf://")) else f"{path.rstrip('/')}/{name}" for name in listed]
    return [path.removeprefix("file://")]


def _of_address(name: str) -> str:
    """Return the place of a file on the Hub, if `name` is its address on the web, and otherwise `name` itself."""
    if (found := _ON_HUB.fullmatch(name)) is None:
        return name
    owner, revision, file = found.groups()
    return f"hf://{owner}{'' if revision == 'main' else f'@{revision}'}/{file}"


def sources_at(
    paths: Sequence[str], rows: Mapping[str, Any], subset: Any = None, split: str | None = None
) -> list[dict[str, Any]]:
    """Return a source at each path, with the given parts of `rows`, such as their format.

    For a data set of the Hub it also has a subset, and a split other than train.
    """
    of_hub = {"subset": subset, "split": None if split == "train" else split}
    return [
        {
            "path": path,
            **{
                name: value for name, value in {**rows, **(of_hub if path.startswith("hf://") else {})}.items() if value
            },
        }
        for path in paths
    ]


def sections(given: Any) -> list[dict[str, Any]]:
    """Return the sections of a list, or the one that stands in a list's place. A name is a section with only a path."""
    listed = given if isinstance(given, list) else [given]
    named = [{"path": item} if isinstance(item, str) and item else item for item in listed]
    return [item for item in named if isinstance(item, dict)]


def is_hub_dataset(path: str) -> bool:
    """Return whether `path` names a data set of the Hub, and nothing that is here."""
    return bool(_HUB_ID.fullmatch(path)) and not _FILE.search(path) and not Path(path).expanduser().exists()


def read_split(keys: Keys, key: str, given: Any) -> tuple[str | None, dict[str, int | float]]:
    """Return the name of a split, and what is taken of it: `take` and `skip` of a source, as far as they are asked for.

    If `key` asks for more than that, this is reported as lost.
    """
    if not given:
        return None, {}
    if (found := _FIRST.fullmatch(str(given).strip())) is not None:
        amount, percent = int(found[2]), found[3]
        taken = (amount / 100 if amount < 100 else None) if percent else amount or None
        return found[1], {"take": taken} if taken is not None else {}
    if (found := _BETWEEN.fullmatch(str(given).strip())) is not None:
        first, end = int(found[2]), int(found[3] or 0)
        if not end or end > first:
            return found[1], {"skip": first, **({"take": end - first} if end else {})}
    name = re.split(r"[\[+]", str(given))[0].strip()
    if name != str(given):
        keys.lose(
            key, f"{given}: a part that is counted from its end or in per cent, or several splits. It is read whole."
        )
    return name, {}
