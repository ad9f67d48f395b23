"""The verb that continues a run or a sweep."""

from launcher.cli.command import Command
from launcher.cli.options import DryRun, Json, Overrides, RunName, StoreOption, TakeOver, TrustRun, open_run, say
from launcher.cli.verbs.train import start_run


def resume(
    run: RunName,
    overrides: Overrides = None,
    store: StoreOption = "runs",
    take_over: TakeOver = False,
    trust_run: TrustRun = False,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Continue a run from its newest committed checkpoint, on any number of ranks; or a sweep, with its unfinished
    trials.
    """
    from launcher.cli.verbs.sweep import start_sweep
    from launcher.policy.foreign import check_own, started
    from launcher.view.sweep import is_sweep
    from trainer.run.folder import run_config

    folder = open_run(run, store)
    config = run_config(folder, overrides or (), say=say)
    check_own(folder, config, started, overrides or (), trust=trust_run)
    if is_sweep(folder):
        start_sweep(config, resume=True, take_over=take_over, as_json=as_json, dry_run=dry_run)
        return
    start_run(config, resume=True, take_over=take_over, as_json=as_json, dry_run=dry_run)


VERBS = {
    "resume": Command(resume, "resume first cluster.workers=1", 60),
}
