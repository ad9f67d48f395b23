"""accelerate's keys that make settings together: processes, and what goes to the host."""

from pathlib import Path

from launcher.init.importing import joint_settings
from launcher.init.importing.mapping import Keys
from trainer.config.peers import conversions as to


def join(keys: Keys, folder: Path) -> None:
    """All settings that several keys make."""
    joint_settings.workers(keys, "num_processes")
    if keys.whole("num_machines", 1) > 1:
        keys.put("cluster.slurm.nodes", keys.whole("num_machines"), "num_machines")
    joint_settings.offloading(keys, folder)
    file = keys.given.get("deepspeed_config.deepspeed_config_file")
    if file:
        keys.attempt("deepspeed_config.deepspeed_config_file", lambda: to.offload(file))
    for part, policy in (("optimizer", "zero3_offload_optimizer"), ("param", "zero3_offload_cpu")):
        name = f"deepspeed_config.offload_{part}_device"
        if keys.given.get(name) in ("cpu", "nvme"):
            keys.put("sharding.deepspeed", policy, name)
