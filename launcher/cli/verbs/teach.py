"""The verb about a teacher."""

from launcher.cli.command import Command
from launcher.cli.options import ConfigFile, DryRun, Json, Overrides, emit, say


def teach(config: ConfigFile, overrides: Overrides = None, as_json: Json = False, dry_run: DryRun = False) -> None:
    """Ask the teacher of objective.teacher for its log-probabilities and store them beside the data, once, before the
    run. For opd, judge the answers beside the run. Continues where it was killed.
    """
    from launcher.data.teach import teach as taught
    from launcher.start.group import is_silent_rank

    found = taught(config, overrides or (), dry_run=dry_run, log=say)
    if not is_silent_rank():
        emit(found, as_json, lambda result: result.sentence())


VERBS = {"teach": Command(teach, "teach distil.yaml --dry-run", 45)}
