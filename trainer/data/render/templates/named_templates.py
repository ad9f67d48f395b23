"""Chat templates by name, for bases that have none: as the owners of these formats document them.

Each is short and has no tools. The tokens are those that end and begin its turns; a base that lacks one, or has never seen it, learns it
with `model.add_tokens`.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class NamedTemplate:
    """A template's text, the tokens that it needs, and whose format it is."""

    text: str
    tokens: tuple[str, ...]
    source: str


_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

# Gemma has no turn of a system: its words stand before the first question.
_GEMMA = """\
{{- bos_token -}}
{%- set talk = messages[1:] if messages[0]['role'] == 'system' else messages -%}
{%- for message in talk -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('the turns of gemma alternate between user and assistant, after at most one system message') -}}
{%- endif -%}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}
{%- if loop.first and messages[0]['role'] == 'system' -%}{{- messages[0]['content'] | trim + '\\n\\n' -}}{%- endif -%}
{{- message['content'] | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

# Neither has Mistral: the words of a system stand before the last question.
_MISTRAL = """\
{{- bos_token -}}
{%- set talk = messages[1:] if messages[0]['role'] == 'system' else messages -%}
{%- set last = namespace(question=-1) -%}
{%- for message in talk -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('the turns of mistral alternate between user and assistant, after at most one system message') -}}
{%- endif -%}
{%- if message['role'] == 'user' -%}{%- set last.question = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in talk -%}
{%- if message['role'] == 'user' -%}
{{- '[INST] ' -}}
{%- if loop.index0 == last.question and messages[0]['role'] == 'system' -%}{{- messages[0]['content'] + '\\n\\n' -}}{%- endif -%}
{{- message['content'] + '[/INST]' -}}
{%- else -%}
{{- ' ' + message['content'] | trim + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""

_PHI3 = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""

NAMED: Mapping[str, NamedTemplate] = {
    "chatml": NamedTemplate(_CHATML, ("<|im_start|>", "<|im_end|>"), "OpenAI's ChatML, which Qwen has too"),
    "llama3": NamedTemplate(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "Meta's Llama 3"),
    "gemma": NamedTemplate(_GEMMA, ("<start_of_turn>", "<end_of_turn>"), "Google's Gemma 1 to 3"),
    "mistral": NamedTemplate(
        _MISTRAL, ("[INST]", "[/INST]"), "Mistral's instruct models with the tokenizer of version 3"
    ),
    "phi3": NamedTemplate(_PHI3, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "Microsoft's Phi-3"),
}
"""The named templates; where a base has the tokens of several, the first is the one to take."""
