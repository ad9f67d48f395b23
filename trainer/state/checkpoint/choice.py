"""The checkpoint that a user names by `--step` or `--best`, for every command that reads one."""

from trainer.errors import ConfigError
from trainer.state.checkpoint.listing import committed_steps
from trainer.state.checkpoint.manifest import check_step, comparable_losses, readable_manifests
from trainer.store.store import Store


def chosen_step(folder: Store, step: int | None, *, best: bool) -> int | None:
    """The step of `--step`, or with `--best` that of the lowest evaluation loss, the newer of equals, over the data of the
    newest evaluation; with neither None, which
    stands for the newest that is whole. Reads manifests, no shards: `whole_checkpoint` of the step proves it.

    Raises:
        NothingToResume: the run has no committed checkpoint.
        ConfigError: both were given, there is no such step, or no checkpoint was evaluated; it names the steps that there are.
    """
    if best and step is not None:
        raise ConfigError(f"--best chooses the step, and --step {step} names one. Leave out one of them.")
    if step is None and not best:
        return None
    steps = committed_steps(folder)
    check_step(folder, steps, step)
    if step is not None:
        return step
    losses = comparable_losses(readable_manifests(folder, [], steps))
    if not losses:
        raise ConfigError(
            f"--best: no checkpoint of {folder.uri} was evaluated when it was saved (eval.every). Name one with --step. "
            f"Its steps are: {', '.join(map(str, sorted(steps)))}."
        )
    return min(losses, key=lambda found: (losses[found], -found))
