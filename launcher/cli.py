"""The `capstan` command. Imports nothing heavy: what a verb needs is imported when the verb runs."""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from trainer.errors import CapstanError, ConfigError

app = typer.Typer(
    help="Fine-tune language models that are too large for one machine. --debug anywhere adds the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Compile and inspect training data.", no_args_is_help=True)
config_app = typer.Typer(help="The configuration's schema.", no_args_is_help=True)
checkpoints_app = typer.Typer(help="A run's committed checkpoints.", no_args_is_help=True)
submit_app = typer.Typer(help="Hand a run over to a cluster and return.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(submit_app, name="submit")
app.add_typer(config_app, name="config")
app.add_typer(checkpoints_app, name="checkpoints")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings to change, such as train.steps=20.")
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name in the store, or its full URI.")]
StoreOption = Annotated[str, typer.Option("--store", envvar="CAPSTAN_STORE", help="The store that RUN is in.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; logs go to stderr.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _emit(value: Any, as_json: bool, show: Callable[[Any], Any]) -> None:
    """One JSON object on stdout, or what `show` makes of the value: text as it is, anything else printed by rich."""
    if as_json:
        print(json.dumps(value.to_json()))
    elif isinstance(shown := show(value), str):
        print(shown)
    else:
        from rich.console import Console

        Console().print(shown)


def _open_run(run: str, store: str) -> Any:
    """The run's folder; raises `ConfigError`, naming the runs there are, when it does not exist."""
    from launcher.status import find_run

    return find_run(run, store)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"capstan {version('capstan-llm')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Fine-tune language models that are too large for one machine. --debug anywhere adds the traceback of an error."""


@app.command()
def doctor(
    store: Annotated[
        str | None, typer.Option("--store", envvar="CAPSTAN_STORE", help="A store to write a probe to.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check this machine: versions, accelerator, kernels, a store; say what is missing and how to get it."""
    from launcher.doctor import diagnose, report_table

    report = diagnose(store)
    _emit(report, as_json, report_table)
    raise typer.Exit(0 if report.ok else 2)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpu_memory: Annotated[float | None, typer.Option(help="Memory of one GPU, in GiB.")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(help="Ranks on one node. Default: all of them.")] = None,
    as_json: Json = False,
) -> None:
    """Memory per GPU and host, batch arithmetic and traffic of a run, without a GPU. Exit code 4 when it does not fit."""
    from dataclasses import replace

    from launcher.report import plan_table
    from trainer.architecture import mismatches
    from trainer.base import read_base_config
    from trainer.config import load_config
    from trainer.data.sources import unusable
    from trainer.errors import DataError, DoesNotFit
    from trainer.plan import make_plan

    run = load_config(config, overrides or ())
    world_size = run.cluster.most_workers or 1
    memory = int(gpu_memory * 2**30) if gpu_memory else None
    base_config = read_base_config(run.model)
    result = make_plan(run, base_config, world_size, ranks_per_node or world_size, memory)
    missing = unusable(run.data)
    result = replace(result, shortfalls=[*result.shortfalls, *missing])
    _emit(result, as_json, plan_table)
    if result.shortfalls:
        kind = ConfigError if mismatches(run, base_config) else DataError if missing else DoesNotFit
        raise kind("\n".join(result.shortfalls))


@data_app.command("build")
def data_build(config: ConfigFile, overrides: Overrides = None, as_json: Json = False, dry_run: DryRun = False) -> None:
    """Compile the sources into token shards, as train does by itself when they are missing."""
    from launcher.data_build import build

    _emit(build(config, overrides or (), dry_run=dry_run, log=_log), as_json, lambda result: result.table())


@data_app.command("check")
def data_check(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Report on the sources: lengths, duplicates, odd and bad rows. Exit code 3 when train would refuse them."""
    from launcher.data_check import check, report_table
    from trainer.errors import DataError

    report = check(config, overrides or ())
    _emit(report, as_json, report_table)
    if report.refusals:
        raise DataError("\n".join(report.refusals))


@app.command()
def train(config: ConfigFile, overrides: Overrides = None, as_json: Json = False, dry_run: DryRun = False) -> None:
    """Train here and now: under Ray on this machine (or cluster.ray.address), or as a rank of torchrun or srun."""
    from trainer.config import dump_config, load_config

    run = load_config(config, overrides or ())
    if dry_run:
        from launcher.submission import check

        check(run, resume=False)
        print(json.dumps(run.model_dump(mode="json")) if as_json else dump_config(run).rstrip())
        return
    _train(run, resume=False, as_json=as_json)


@app.command()
def resume(
    run: RunName,
    overrides: Overrides = None,
    store: StoreOption = "runs",
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Continue a run from its newest committed checkpoint, at any number of workers."""
    from trainer.config import dump_config, parse_config
    from trainer.run_layout import CONFIG

    folder = _open_run(run, store)
    # Where it was found counts: a run may have been moved since it was configured.
    found = f"run.store={folder.uri.rpartition('/')[0]}"
    config = parse_config(folder.get(CONFIG).decode(), [found, *(overrides or ())])
    if dry_run:
        from launcher.submission import check

        check(config, resume=True)
        print(json.dumps(config.model_dump(mode="json")) if as_json else dump_config(config).rstrip())
        return
    _train(config, resume=True, as_json=as_json)


@submit_app.command("ray")
def submit_ray(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest commit.")] = False,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Submit to the Ray cluster of cluster.ray.address or RAY_ADDRESS; without one, start in the background here."""
    from launcher.ray_jobs import submit
    from trainer.config import load_config

    submitted = submit(load_config(config, overrides or ()), resume=resume, dry_run=dry_run)
    _emit(submitted, as_json, lambda result: result.text())


@submit_app.command("slurm")
def submit_slurm(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest commit.")] = False,
    after: Annotated[
        str | None,
        typer.Option("--after", metavar="RUN", help="Start when this run, submitted to Slurm, has finished."),
    ] = None,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Submit a batch job to Slurm; --dry-run prints the batch file."""
    from launcher.slurm import submit
    from trainer.config import load_config

    submitted = submit(load_config(config, overrides or ()), resume=resume, after=after, dry_run=dry_run)
    _emit(submitted, as_json, lambda result: result.text())


def _train(config: Any, *, resume: bool, as_json: bool) -> None:
    from launcher.local import is_silent_rank, start
    from launcher.status import read_status, render
    from launcher.submission import run_folder
    from trainer.run_layout import CONFIG

    try:
        start(config, resume=resume, live=not as_json and sys.stderr.isatty(), log=_log)
    except CapstanError:
        # What became of it is worth knowing also after a stop or a failure; a mistake leaves no run to speak of.
        if as_json and not is_silent_rank() and run_folder(config).exists(CONFIG):
            _emit(read_status(run_folder(config)), as_json, render)
        raise
    if not is_silent_rank():
        _emit(read_status(run_folder(config)), as_json, render)


@app.command()
def status(
    run: RunName,
    store: StoreOption = "runs",
    follow: Annotated[bool, typer.Option("--watch", help="Keep showing it until the run ends.")] = False,
    as_json: Json = False,
) -> None:
    """What a run is doing, from its folder alone; for a run submitted to Slurm, Slurm's word on its jobs too."""
    from launcher.slurm_queue import is_over, record, slurm_status
    from launcher.status import read_status, render, watch_table

    folder = _open_run(run, store)
    job = record(folder)
    if follow:
        watch_table(folder, is_over(folder, job) if job else None)
    if job and (as_json or not follow):
        _emit(slurm_status(folder, job), as_json, lambda status: status.table())
    elif as_json or not follow:
        _emit(read_status(folder), as_json, render)


@app.command()
def logs(
    run: RunName,
    store: StoreOption = "runs",
    rank: Annotated[int, typer.Option(help="Whose log.")] = 0,
    generation: Annotated[int | None, typer.Option(help="Which start of the run. Default: the newest.")] = None,
    driver: Annotated[bool, typer.Option("--driver", help="What the driver said, instead of a rank.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as the log grows.")] = False,
    job: Annotated[bool, typer.Option("--job", help="The Slurm job's own output instead: Ray and the driver.")] = False,
    as_json: Json = False,
) -> None:
    """A rank's log, or the driver's."""
    from launcher.logs import follow_log, read_driver_log, read_log

    folder = _open_run(run, store)
    if follow and (as_json or driver or job):
        raise ConfigError("--follow shows a rank's log as it grows. Leave out --json, --driver and --job, or --follow.")
    if driver or job or as_json:
        from launcher.slurm_queue import job_output

        text = job_output(folder) if job else read_driver_log(folder) if driver else read_log(folder, rank, generation)
        owner = {"job": True} if job else {"driver": True} if driver else {"rank": rank, "generation": generation}
        print(json.dumps({"run": folder.uri, **owner, "text": text}) if as_json else text, end="\n" if as_json else "")
    elif follow:
        for text in follow_log(folder, rank, generation):
            print(text, end="", flush=True)
    else:
        print(read_log(folder, rank, generation), end="")


@app.command()
def stop(run: RunName, store: StoreOption = "runs", as_json: Json = False, dry_run: DryRun = False) -> None:
    """Ask a run to commit a checkpoint and end with exit code 75; a Slurm job that has not started is cancelled."""
    from launcher import slurm_queue
    from launcher.status import request_stop

    folder = _open_run(run, store)
    if job := slurm_queue.record(folder):
        what = slurm_queue.stop(folder, job, dry_run=dry_run)
    elif dry_run:
        what = f"would ask {folder.uri} to stop"
    else:
        request_stop(folder, by="capstan stop")
        what = f"asked {folder.uri} to stop"
    if as_json:
        print(json.dumps({"run": folder.uri, "stop_requested": not dry_run, "dry_run": dry_run, "what": what}))
    else:
        _log(what if dry_run else f"{what}; `capstan status {run}` shows what becomes of it")


@checkpoints_app.command("ls")
def checkpoints_ls(run: RunName, store: StoreOption = "runs", as_json: Json = False) -> None:
    """List committed checkpoints: step, size, age, world size, evaluation loss."""
    from launcher.checkpoints import checkpoint_table, list_checkpoints

    _emit(list_checkpoints(_open_run(run, store)), as_json, checkpoint_table)


@checkpoints_app.command("verify")
def checkpoints_verify(
    run: RunName,
    store: StoreOption = "runs",
    step: Annotated[int | None, typer.Option(help="Only this one. Default: all.")] = None,
    as_json: Json = False,
) -> None:
    """Read every checkpoint whole and compare it with its hashes. Exit code 6 when one is damaged."""
    from launcher.checkpoints import checkpoint_table, verify_checkpoints

    found = verify_checkpoints(_open_run(run, store), step)
    _emit(found, as_json, checkpoint_table)
    raise typer.Exit(0 if found.ok else 6)


@checkpoints_app.command("prune")
def checkpoints_prune(
    run: RunName,
    store: StoreOption = "runs",
    keep_last: Annotated[int | None, typer.Option(min=1, help="Default: the run's checkpoint.keep_last.")] = None,
    keep_every: Annotated[int | None, typer.Option(min=0, help="Default: the run's checkpoint.keep_every.")] = None,
    keep_best: Annotated[int | None, typer.Option(min=0, help="Default: the run's checkpoint.keep_best.")] = None,
    orphan_hours: Annotated[
        float,
        typer.Option(
            min=0, help="Remove what no commit refers to when it is so old. Below an hour only when no job runs."
        ),
    ] = 24.0,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Remove the checkpoints that the rules do not keep, and what dead saves left behind."""
    from launcher.checkpoints import prune_checkpoints

    folder = _open_run(run, store)
    pruned = prune_checkpoints(
        folder,
        keep_last=keep_last,
        keep_every=keep_every,
        keep_best=keep_best,
        orphan_hours=orphan_hours,
        dry_run=dry_run,
        log=_log,
    )
    _emit(pruned, as_json, lambda result: result.sentence())


@app.command()
def export(
    run: RunName,
    destination: Annotated[str, typer.Argument(metavar="DEST", help="A new folder, or an s3://, gs:// or az:// URI.")],
    store: StoreOption = "runs",
    merge: Annotated[bool, typer.Option("--merge", help="The whole model: base and adapter, merged.")] = False,
    step: Annotated[int | None, typer.Option(help="Which checkpoint. Default: the newest that is whole.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare its logits in plain transformers + PEFT with the trained model's.")
    ] = False,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Write a committed checkpoint as a PEFT adapter, or merged with its base, to a folder or a bucket."""
    from launcher.export import export_run

    folder = _open_run(run, store)
    result = export_run(folder, destination, merge=merge, step=step, verify=verify, dry_run=dry_run)
    _emit(result, as_json, lambda exported: exported.sentence())


@app.command()
def smoke(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="Your own run, scaled down. Default: a small one, made on the spot."),
    ] = None,
    overrides: Overrides = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Use only the first layers of your base.")] = None,
    directory: Annotated[
        Path, typer.Option("--dir", help="Where it works; kept, so that a second time is faster.")
    ] = Path("smoke"),
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Take one run through its whole life in small: train, kill, resume on another world size, export, verify."""
    from launcher.smoke import plan_smoke, run_smoke
    from launcher.smoke_verdict import table

    if dry_run:
        planned = plan_smoke(config, overrides or (), layers=layers, directory=directory)
        _emit(planned, as_json, lambda plan: plan.text())
        return
    result = run_smoke(config, overrides or (), layers=layers, directory=directory, show=not as_json)
    _emit(result, as_json, table)
    raise typer.Exit(0 if result.ok else result.exit_code or 1)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of the configuration, for editors."""
    from trainer.config import Config

    print(json.dumps(Config.model_json_schema(), indent=2))


def main() -> None:
    """Entry point: a user's mistake is one sentence and its exit code; `--debug` anywhere shows the traceback too."""
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=arguments)
    except CapstanError as error:
        if debug:
            traceback.print_exc()
        _log(f"capstan: {error}")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
