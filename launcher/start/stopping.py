"""A stop that is asked for while no rank is there to commit, so that the start itself has to end."""

from trainer.errors import NothingCommitted, Stopped
from trainer.run.folder import command
from trainer.run.owner import ended_waiting
from trainer.run.records import record_end
from trainer.run.requests import read_stop
from trainer.state.checkpoint.listing import committed_steps
from trainer.store.store import Store


def stop_if_asked(folder: Store, when: str) -> None:
    """Raise `Stopped` when somebody has asked the run to stop; `NothingCommitted` where there is nothing to resume
    then.
    """
    if asked := read_stop(folder):
        if committed_steps(folder):
            raise Stopped(
                f"stopped {asked.reason} {when}; what was committed before stays. {command('resume', folder)} goes on."
            )
        raise NothingCommitted(
            f"stopped {asked.reason} {when}, and nothing is committed. Start it again from its configuration."
        )


def give_up_waiting(folder: Store) -> None:
    """Free a run that was submitted and whose turn has not come: nobody else is there to say that it has ended."""
    if ended_waiting(folder):
        record_end(folder, "stopped before its job had begun", stopped=True)
