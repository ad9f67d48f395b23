"""The verb that samples for a run."""

from launcher.cli.command import Command
from launcher.cli.options import DryRun, Json, Overrides, RunName, StoreOption, TrustRun, emit, open_run, say


def rollout(
    run: RunName,
    overrides: Overrides = None,
    store: StoreOption = "runs",
    trust_run: TrustRun = False,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Ask the servers of rollout.engine for the answers that a run learns from, beside the run, until it has all of
    them. The run normally starts this itself.
    """
    from launcher.data.rollout import rollout as rolled
    from launcher.policy.foreign import check_own, started
    from trainer.run.folder import run_config

    folder = open_run(run, store)
    check_own(folder, run_config(folder, overrides or ()), started, overrides or (), trust=trust_run)
    found = rolled(folder, overrides or (), dry_run=dry_run, log=say)
    emit(found, as_json, lambda result: result.sentence())


VERBS = {"rollout": Command(rollout, "rollout my-run", 47)}
