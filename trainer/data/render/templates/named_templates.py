"""Chat templates by name, for bases that have none: as the owners of these formats document them.

Each is a file beside this one, is short and has no tools. Its text belongs to the fingerprint of data, so that a comment in it would have
all data compiled again. The tokens are those that end and begin its turns; a base that lacks one, or
has never seen it, learns it with `model.add_tokens`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class NamedTemplate:
    """A template's name, the tokens that it needs, and whose format it is."""

    name: str
    tokens: tuple[str, ...]
    source: str

    @property
    def text(self) -> str:
        return (Path(__file__).parent / f"{self.name}.jinja").read_text(encoding="utf-8")


_TEMPLATES = (
    NamedTemplate("chatml", ("<|im_start|>", "<|im_end|>"), "OpenAI's ChatML, which Qwen has too"),
    NamedTemplate("llama3", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "Meta's Llama 3"),
    # Gemma and Mistral have no turn of a system: its words stand before the first question, and before the last.
    NamedTemplate("gemma", ("<start_of_turn>", "<end_of_turn>"), "Google's Gemma 1 to 3"),
    NamedTemplate("mistral", ("[INST]", "[/INST]"), "Mistral's instruct models with the tokenizer of version 3"),
    NamedTemplate("phi3", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "Microsoft's Phi-3"),
)
NAMED: Mapping[str, NamedTemplate] = {template.name: template for template in _TEMPLATES}
"""The named templates; where a base has the tokens of several, the first is the one to take."""
