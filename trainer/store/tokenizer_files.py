"""The names of the files that decide what a tokenizer does.

A base has these files beside its weights, and a run keeps them. A manifest names files that a reader of the run writes
into folders of their own machine. Only these names may come out of a store, so somebody else's run cannot choose where
files are written.
"""

import re

CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    CHAT_TEMPLATE,
    "chat_template.json",
)
NAMED_TEMPLATES = "additional_chat_templates"
"""The folder with a tokenizer's other chat templates, such as one for calls of tools, each by its name."""
_NAMED_TEMPLATE = re.compile(rf"{NAMED_TEMPLATES}/[^/\\\x00-\x1f\x7f]{{1,200}}\.jinja")


def is_tokenizer_file(name: str) -> bool:
    return name in TOKENIZER_FILES or _NAMED_TEMPLATE.fullmatch(name) is not None
