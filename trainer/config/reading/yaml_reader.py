"""YAML into plain values: null, true or false, numbers, text, lists and mappings, and nothing that surprises.

PyYAML's safe loader runs no code, but it lets the last of two equal keys win, follows aliases to sizes that no machine
holds, recurses as deep as the text nests, and lets Python's own exceptions out for a scalar that is no value. Here each
of these is one sentence with its line. Text that looks like a date stays text: no setting is a date. So does 010, which
YAML 1.1 takes for 8 and YAML 1.2 for 10, and 1:30, which it takes for 90.
"""

import re
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

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
    """The value of `text`, which is UTF-8 where it is bytes; `name` is what messages call it. Of a key that is
    `repeated` the last value counts, where that is allowed, as in the files of other tools.

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
