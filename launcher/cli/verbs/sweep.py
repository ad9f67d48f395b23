"""The verb that searches over settings, and the function that starts or continues a search."""

import json
import sys
from typing import Any

from launcher.cli.command import Command
from launcher.cli.options import ConfigFile, DryRun, Json, Overrides, emit, log, say
from launcher.view.terminal import put
from trainer.errors import CapstanError, ConfigError


def sweep(config: ConfigFile, overrides: Overrides = None, as_json: Json = False, dry_run: DryRun = False) -> None:
    """Try the settings of the section `sweep`, each trial as a run of its own, and end bad trials early."""
    from trainer.config import load_config

    start_sweep(load_config(config, overrides or (), say), as_json=as_json, dry_run=dry_run)


def start_sweep(config: Any, *, resume: bool = False, take_over: bool = False, as_json: bool, dry_run: bool) -> None:
    """Start `config`'s sweep, or continue it."""
    from launcher.drive.sweep.driver import laid_out, run_sweep
    from launcher.policy.trials import in_words
    from launcher.view.sweep import is_sweep, read_sweep, render_sweep
    from trainer.run.folder import run_folder

    if dry_run:
        _, plan = laid_out(config, resume=resume)
        lines = (f"{trial.run}: {in_words(trial.settings)}" for trial in plan.trials)
        put(json.dumps(plan.to_json()) if as_json else "\n".join(lines))
        return
    live = not as_json and sys.stderr.isatty()
    try:
        emit(run_sweep(config, resume=resume, take_over=take_over, live=live, log=log), as_json, render_sweep)
    except ConfigError:
        raise  # the existing sweep may be another one's
    except CapstanError:
        folder = run_folder(config)
        if is_sweep(folder):
            emit(read_sweep(folder), as_json, render_sweep)
        raise


VERBS = {
    "sweep": Command(sweep, "sweep sweep.yaml", 140),
}
