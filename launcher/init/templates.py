"""The chat template of a first configuration, where the base has none and the data are conversations."""

from pathlib import Path

from launcher.init.choice import Setting
from trainer.config import Config
from trainer.data.compile.inputs import find_train, has_conversations
from trainer.data.render.templates.named_templates import NAMED
from trainer.data.render.templates.template import fitting_template, has_template, tokens_of
from trainer.data.source.files import is_of_hub
from trainer.errors import CapstanError


def template_for(config: Config, directory: Path) -> dict[str, Setting]:
    """A named template whose tokens the base has, or the first of all, and its tokens, which such a base has never seen: an adapter learns
    their rows too; `directory` has the base's own. Nothing where the base has a template, or the rows that can be read here are no conversations."""
    if has_template(config.data, directory) or not _talks(config):
        return {}
    name = fitting_template(tokens_of(directory)) or next(iter(NAMED))
    found: dict[str, Setting] = {
        "data.template": (name, f"{NAMED[name].source}; the base has no chat template of its own")
    }
    if config.tuning.method != "full":
        why = "the template's, which such a base has not learnt: their rows learn too; vLLM takes them merged"
        found["model.add_tokens"] = (list(NAMED[name].tokens), why)
    return found


def _talks(config: Config) -> bool:
    if any(is_of_hub(source) for source in config.data.train):
        return False
    try:
        return any(map(has_conversations, find_train(config).files))
    except CapstanError:
        return False
