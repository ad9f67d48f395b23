"""The verb about a teacher."""

from launcher.cli.command import Command
from launcher.cli.options import ConfigFile, DryRun, Json, Overrides, emit, say


def teach(config: ConfigFile, overrides: Overrides = None, as_json: Json = False, dry_run: DryRun = False) -> None:
    """Have the teacher of objective.teacher write its log-probabilities beside the data, once, before the run, or for
    opd judge the answers beside it; goes on where it was killed.
    """
    from launcher.data.teach import teach as taught
    from launcher.start.group import is_silent_rank

    found = taught(config, overrides or (), dry_run=dry_run, log=say)
    if not is_silent_rank():
        emit(found, as_json, lambda result: result.sentence())


VERBS = {"teach": Command(teach, "teach distil.yaml --dry-run", 45)}
