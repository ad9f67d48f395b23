"""`capstan train` and `capstan resume`: checks, data, the claim of the name, then ranks.

Everything that can be wrong without a rank is found here, before torch is imported or a process group waits.
"""

import os
import threading
from collections.abc import Callable

from trainer import run_layout
from trainer.base import check_base, resolve_base
from trainer.config import Config, dump_config, parse_config
from trainer.data.compile import Progress
from trainer.data.prepare import Datasets, prepare
from trainer.errors import AlreadyExists, CapstanError, ConfigError, NotFound, NothingToResume
from trainer.manifest import committed_steps
from trainer.store import Store, open_store

from launcher.ray_train import run_on_ray


def is_rank() -> bool:
    """Whether torchrun, or srun with more than one task, started this process as one rank of a group."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
