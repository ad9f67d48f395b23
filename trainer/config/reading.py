"""The text of a configuration becomes a tree of plain values, overrides (`key.path=value`) change it, and its mistakes
are told in words.

A plain value is null, true or false, a number, text, a list or a mapping, and nothing that surprises.

PyYAML's safe loader runs no code, but it lets the last of two equal keys win, follows aliases to sizes that no machine
holds, recurses as deep as the text nests, and lets Python's own exceptions out for a scalar that is no value. Here each
of these is one sentence with its line. Text that looks like a date stays text: no setting is a date. So does 010, which
YAML 1.1 takes for 8 and YAML 1.2 for 10, and 1:30, which it takes for 90.

An override also removes what it contradicts. A mistake is one sentence for each setting: its name, the value, what is
allowed, an example.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from trainer.config.registry import kinds
from trainer.config.section import Section
from trainer.config.tree import fields, sections_in
from trainer.errors import ConfigError, shown

_MAX_BYTES = 2**19
_MAX_DEPTH = 32
_MAX_WRITTEN = 20_000  # values, keys and aliases; PyYAML takes 25 to 50 microseconds for each
_MAX_VALUES = 100_000  # after aliases are followed
_MERGE, _MERGE_KEY = "tag:yaml.org,2002:merge", "<<"
_PLAIN = {
    "tag:yaml.org,2002:null": "null",
    "tag:yaml.org,2002:bool": "true or false",
    "tag:yaml.org,2002:int": "a whole number of 64 bits",
    "tag:yaml.org,2002:float": "a number",
    "tag:yaml.org,2002:str": "text",
    "tag:yaml.org,2002:seq": "a list",
    "tag:yaml.org,2002:map": "a mapping",
}


def read_yaml(text: str | bytes, name: str, repeated: bool = False) -> Any:
    """Return the value of `text`, which is UTF-8 if it is bytes; `name` is what messages call it. If keys may be
    `repeated`, as in the files of other tools, the last value of a key counts.

    Raises:
        ConfigError: it is no YAML, or holds what is refused above.
    """
    if len(text) > _MAX_BYTES:
        raise ConfigError(f"{name} is no configuration: it has {len(text)} bytes. Allowed are {_MAX_BYTES}.")
    try:
        return yaml.load(
            text if isinstance(text, str) else text.decode("utf-8"), _LastKeyLoader if repeated else _Loader
        )
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not text in UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{name}{where} is not YAML: {error.problem or error.context}.") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ConfigError(f"{name} is not YAML: {' '.join(str(error).split())}.") from error


class _Loader(yaml.SafeLoader):
    repeated = False

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._written = self._merged = 0

    def get_single_node(self) -> Node | None:
        node = super().get_single_node()
        if node is not None:
            _measure(node, {})
        return node

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self._depth += 1
        self._written += 1
        if self._written > _MAX_WRITTEN:
            raise _refusal(f"it has more than {_MAX_WRITTEN} keys and values", self.peek_event().start_mark)
        if self._depth > _MAX_DEPTH:
            raise _refusal(f"it nests more than {_MAX_DEPTH} levels deep", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        """No key twice, and merges (`<<`) followed: PyYAML's own way lets the merged value win over the one that
        replaces it.
        """
        node = super().compose_mapping_node(anchor)
        own: dict[Any, tuple[Node, Node]] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                raise _refusal("a key is a list or a mapping, not a name", key.start_mark)
            name = key.value if key.tag == _MERGE else self.construct_object(key)
            if name in own and not self.repeated:
                first = own[name][0].start_mark.line + 1
                raise _refusal(f"{shown(name)} is given twice, first in line {first}", key.start_mark)
            own[name] = key, value
        if _MERGE_KEY in own:
            _, merged = own.pop(_MERGE_KEY)
            for source in merged.value if isinstance(merged, SequenceNode) else [merged]:
                if not isinstance(source, MappingNode) or source is node:
                    raise _refusal("what is merged with << is no other mapping", source.start_mark)
                self._merged += len(source.value)
                if self._merged > _MAX_VALUES:
                    raise _refusal("merges make it too large", source.start_mark)
                for key, value in source.value:
                    own.setdefault(self.construct_object(key), (key, value))
        node.value = list(own.values())
        return node

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        if not isinstance(node, ScalarNode):
            return super().construct_object(node, deep=deep)
        try:
            return _storable(super().construct_object(node, deep=deep))
        except (ValueError, LookupError, AttributeError) as error:
            kind = _PLAIN.get(node.tag, node.tag)
            raise _refusal(f"{shown(node.value)} cannot be read as {kind}", node.start_mark) from error

    def construct_unknown(self, node: Node) -> Any:
        raise _refusal(f"the tag {shown(node.tag)} is not known here", node.start_mark)


class _LastKeyLoader(_Loader):
    repeated = True


_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"([-+]?[0-9][0-9_]*\.[0-9_]*([eE][-+][0-9]+)?|\.[0-9][0-9_]*([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
}
# A date stays text, and so does a single `=`. Only the tags of plain values are known.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, _NUMBERS.get(tag, pattern)) for tag, pattern in resolvers if tag in _PLAIN or tag == _MERGE]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_constructors = {
    None: _Loader.construct_unknown,
    **{tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in _PLAIN},
}


def _storable(value: Any) -> Any:
    """The value of a scalar; raises `ValueError` for a number beyond 64 bits and for text that is not valid in
    UTF-8.
    """
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError
    if isinstance(value, str):
        value.encode()
        if "\0" in value:
            raise ValueError
    return value


def _measure(node: Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How deep `node` nests and how many values it holds, with aliases followed; `known` has what was measured
    before.
    """
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise _refusal("an alias refers to what it is part of", node.start_mark)
        return size
    known[id(node)] = None
    depth = values = 1
    children = node.value if isinstance(node, SequenceNode) else []
    if isinstance(node, MappingNode):
        children = [child for pair in node.value for child in pair]
    for child in children:
        inner, held = _measure(child, known)
        depth, values = max(depth, 1 + inner), values + held
        if depth > _MAX_DEPTH or values > _MAX_VALUES:
            raise _refusal("aliases make it too large", node.start_mark)
    known[id(node)] = depth, values
    return depth, values


def _refusal(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


_MOST_SECTIONS = 8


class _Exclusion(NamedTuple):
    """A setting that replaces others if it has a value for which `when` is true."""

    setting: str
    others: tuple[str, ...]
    when: Callable[[Any], bool] = bool


_EXCLUSIONS = (
    _Exclusion("train.steps", ("train.epochs",)),
    _Exclusion("train.epochs", ("train.steps",)),
    _Exclusion("eval.every", ("eval.per_epoch",)),
    _Exclusion("eval.per_epoch", ("eval.every",)),
    _Exclusion("data.held_out", ("data.eval",)),
    _Exclusion("data.eval", ("data.held_out", "data.held_out_seed")),
    _Exclusion("optim.warmup_steps", ("optim.warmup_ratio",)),
    _Exclusion("optim.warmup_ratio", ("optim.warmup_steps",)),
    _Exclusion("quant.type", ("quant.double",), lambda kind: _leaves_unread(kind, "double")),
    _Exclusion("quant.type", ("quant.cache",), lambda kind: _leaves_unread(kind, "cache")),
)


def _leaves_unread(kind: Any, setting: str) -> bool:
    """Whether a `quant.type` does not read a setting of `quant`."""
    held = kinds("trainer.model.held.formats", "HELD").get(kind)
    return held is not None and held.unread(setting) is not None


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str], name: str, say: Callable[[str], None]) -> None:
    """Change `tree`, the configuration called `name`, by `overrides`; the last of one key counts.

    A setting of the tree that an override contradicts is removed, and `say` gets a sentence about it. Overrides that
    contradict each other both stay, and the settings themselves refuse them.

    Raises:
        ConfigError: an override is not `key=value`, its value is not YAML, or its key leads through a value.
    """
    given = dict[str, Any]()
    for override in overrides:
        key, value, lost = _apply(tree, override)
        given |= _leaves(key, value)
        if lost:
            say(f"{key}={shown(value)} replaces all of {key} in {name}, also {', '.join(lost)}.")
    for setting, others, when in _EXCLUSIONS:
        for other in others if setting in given and when(given[setting]) else ():
            if other not in given and (replaced := _remove(tree, other.split("."))):
                say(f"{setting}={shown(given[setting])} replaces {other}: {shown(replaced)} of {name}.")


def _apply(tree: dict[str, Any], override: str) -> tuple[str, Any, list[str]]:
    """Change `tree`. Returns the key, its value, and the settings of a section that are gone because the value replaces
    the section.
    """
    key, equals, value = override.partition("=")
    name = f"override {shown(override)}"
    if not equals or not key:
        raise ConfigError(f"{name}: expected key=value. Example: train.steps=20.")
    *sections, leaf = key.split(".")
    if len(sections) > _MOST_SECTIONS:
        raise ConfigError(f"{name}: no setting has so many dots in its name.")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{name}: {section!r} is a value, not a section.")
        node = child
    before, node[leaf] = node.get(leaf), read_yaml(value, name)
    if not isinstance(before, dict) or not isinstance(node[leaf], dict):
        return key, node[leaf], []
    return key, node[leaf], [str(inside) for inside in before if inside not in node[leaf]]


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Return the settings that an override of a whole section gives, or the overridden setting itself."""
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inside in value.items():
        yield from _leaves(f"{key}.{name}", inside)


def _remove(tree: Any, path: Sequence[str]) -> Any:
    """Remove a setting and return the value that it had; None if it had none."""
    *sections, leaf = path
    for section in sections:
        tree = tree.get(section) if isinstance(tree, dict) else None
    return tree.pop(leaf, None) if isinstance(tree, dict) else None


_MOST_SENTENCES = 20

# pydantic speaks of Python's types, but users write YAML: type of error -> the words about YAML.
_EXPECTED = {
    "model_type": "Input should be a section of settings",
    "dict_type": "Input should be a section of names and values",
    "list_type": "Input should be a list",
    "string_type": "Input should be text",
}
# Settings of earlier releases by their places, each with what its values are now. Its other values are the default.
_RETIRED = {
    "data.loss_on": {
        "all": "data.train_on.roles: all",
        "whole": "data.train_on.roles: whole",
        "last_assistant": "data.train_on.turns: last",
    }
}


def without_retired(tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` without retired settings that are null, as the configurations of earlier releases have them."""
    found = dict[str, Any]()
    for section, given in tree.items():
        inside = given.items() if isinstance(given, dict) else ()
        kept = {name: value for name, value in inside if value is not None or f"{section}.{name}" not in _RETIRED}
        found[section] = kept if isinstance(given, dict) else given
    return found


def listed(sentences: Sequence[str]) -> str:
    """Return the sentences, one a line, and no more of them than somebody would read."""
    rest = len(sentences) - _MOST_SENTENCES
    return "\n".join([*sentences[:_MOST_SENTENCES], *([f"... and {rest} more like these."] if rest > 0 else [])])


def unknown_keys(tree: Any, model: type[BaseModel], prefix: str) -> Iterator[str]:
    """Keys of `tree` that `model` does not know, each with the nearest name or what is allowed there."""
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        field = model.model_fields.get(key)
        if field is None and (now := _RETIRED.get(f"{prefix}{key}")) is not None:
            instead = now.get(str(value))
            yield (
                f"{prefix}{key}: {shown(value)} is said by data.train_on now."
                f" {f'Write {instead}.' if instead else 'Remove it, or choose by data.train_on.roles.'}"
            )
            continue
        if field is None:
            hint = _hint(str(key), model)
            yield f"{prefix}{shown(key)[1:-1] if isinstance(key, str) else shown(key)}: unknown setting. {hint}"
            continue
        for child in sections_in(field.annotation):
            for place, item in _places(value, field.annotation):
                yield from unknown_keys(item, child, f"{prefix}{key}{place}.")


def _hint(key: str, model: type[BaseModel]) -> str:
    """Return what to write instead. In this order: what another tool's name is called here, a name of the section that
    is almost equal, the same name elsewhere, why another tool's name does not exist here, or a near name of the
    section."""
    # Most configurations have no unknown name, and then the names of other tools are not needed.
    from trainer.config.peers.table import NONE_HERE, SETTINGS_HERE, said_of

    elsewhere = [path for path, _ in fields() if path.rpartition(".")[2] == key]  # a setting put into the wrong section
    if not elsewhere and (known := said_of(key, SETTINGS_HERE)):
        return known
    near = difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.8) or elsewhere
    if not near and (known := said_of(key, NONE_HERE)):
        return known
    near = near or difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else f"Allowed here: {', '.join(model.model_fields)}."


def _places(value: Any, annotation: Any) -> list[tuple[str, Any]]:
    """The sections in a setting's value, each with its place: those of a list, those that have names, or the value
    itself.
    """
    if isinstance(value, list):
        return [(f"[{index}]", item) for index, item in enumerate(value)]
    if get_origin(annotation) is dict:
        return [(f".{name}", item) for name, item in value.items()] if isinstance(value, dict) else []
    return [("", value)]


def explained(errors: Sequence[Any], model: type[BaseModel]) -> Iterator[str]:
    """One sentence for each wrong setting of `model`: its name, the value, what is allowed, an example.

    pydantic reports every branch of a union under a tag such as `list[str]`: the branch that got deepest is the one
    that was meant, and branches that got equally far are alternatives.
    """
    unions: dict[tuple[Any, ...], list[Any]] = {}
    for item in errors:
        location = item["loc"]
        tag = next((i for i, part in enumerate(location) if _is_union_tag(part)), len(location))
        unions.setdefault(location[:tag], []).append(item)
    for items in unions.values():
        depth = max(len(item["loc"]) for item in items)
        settings: dict[tuple[Any, ...], list[Any]] = {}
        for item in items:
            if len(item["loc"]) == depth:
                settings.setdefault(tuple(part for part in item["loc"] if not _is_union_tag(part)), []).append(item)
        yield from (_sentence(path, same, model) for path, same in settings.items())


def _sentence(path: tuple[Any, ...], errors: Sequence[Any], model: type[BaseModel]) -> str:
    first = errors[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    field = _field_at(model, [part for part in path if not isinstance(part, int)])
    example = ""
    if first["type"] == "model_type" and field is not None and "[" not in name:
        example = _section_example(name, field)
    elif field is not None and field.examples:
        example = (
            " Example:"
            f" {yaml.safe_dump(field.examples[0], default_flow_style=True).strip().removesuffix('...').strip()}."
        )
    if first["type"] == "missing":
        return f"{name}: missing, and it has no default.{example}"
    known = dict(_EXPECTED)
    if field is not None and field.description:  # which says in words what a regular expression allows
        known["string_pattern_mismatch"] = field.description.removesuffix(".")
    messages = [known.get(item["type"]) or str(item["msg"]).removesuffix(".") for item in errors]
    allowed = " or ".join([messages[0], *(message.removeprefix("Input should be ") for message in messages[1:])])
    return f"{name}: {shown(first['input'])} is not allowed. {allowed}.{example}"


def _section_example(name: str, field: FieldInfo) -> str:
    """A sentence that a section is given setting by setting, with one as an example; empty if none has an example."""
    inside = next(sections_in(field.annotation), Section).model_fields
    found = next(((key, known.examples[0]) for key, known in inside.items() if known.examples), None)
    return f" Give its settings one by one. Example: {name}.{found[0]}={found[1]}." if found else ""


def _is_union_tag(part: Any) -> bool:
    """pydantic adds the branch of a union to a location, such as `literal['all-linear']` or `list[str]`."""
    return isinstance(part, str) and "[" in part


def _field_at(model: type[BaseModel], path: list[Any]) -> FieldInfo | None:
    field = None
    for part in path:
        field = model.model_fields.get(part)
        if field is None:
            return None
        model = next(sections_in(field.annotation), Section)
    return field
