"""The verb that prints the configuration's schema."""

import json

from launcher.cli.command import Command


def config_schema() -> None:
    """Print the JSON Schema of the configuration, for editors."""
    from trainer.config import Config

    print(json.dumps(Config.model_json_schema(), indent=2))


GROUPS = {"config": "The configuration's schema."}

VERBS = {
    "config schema": Command(config_schema, "config schema", 323),
}
