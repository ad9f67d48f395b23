"""The verb that prints the completion of a shell."""

from launcher.cli.command import Command
from launcher.cli.shell import completion

VERBS = {"completion": Command(completion, "completion bash", 180)}
