"""One server of a submitted run, as srun starts it (`cluster.slurm.launch: direct`).

python -m launcher.cluster.slurm.server RUN_URI
"""

import os
import socket
import sys

from launcher.start import sidecars
from launcher.start.local_ranks import gpus_of_server
from trainer.processes.devices import visible_gpus
from trainer.run.folder import submitted_config
from trainer.store.store import open_store

_ELSEWHERE = ("198.51.100.1", 9)  # an address for documentation (RFC 5737), which this machine does not have


def main() -> None:
    number, here = (int(os.environ[name]) for name in ("SLURM_PROCID", "SLURM_LOCALID"))
    each = submitted_config(open_store(sys.argv[1])).rollout.serve.gpus
    # This is what Slurm says about the node's GPUs: the step has all of them, as do the ranks that may be beside it.
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = given.split(",") if given else visible_gpus()
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus_of_server(here, each, gpus)
    # The server must not look for other tasks of a step.
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        del os.environ[name]
    sidecars.main(sys.argv[1], sidecars.server_name(number), _own_address())


def _own_address() -> str:
    """Return the address of this machine by which others reach it: its name may stand for the loopback address here."""
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    if outside := [address for address in found if not address.startswith("127.")]:
        return outside[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(_ELSEWHERE)  # sends nothing
        return probe.getsockname()[0]


if __name__ == "__main__":
    main()
