"""accelerate's keys that make settings together: processes, and what goes to the host."""

from launcher.init.importing import joint_settings
from launcher.init.importing.mapping import Keys

_IN_WHOLE_NUMBERS = {"amxint8": "int8", "amxint4": "nf4"}


def join(keys: Keys) -> None:
    """Make all settings that several keys make together."""
    joint_settings.workers(keys, "num_processes")
    if keys.whole("num_machines", 1) > 1:
        keys.put("cluster.slurm.nodes", keys.whole("num_machines"), "num_machines")
    joint_settings.offloading(keys)
    if keys.asked("kt_config.enabled"):
        _experts(keys)
    for part, policy in (("optimizer", "zero3_offload_optimizer"), ("param", "zero3_offload_cpu")):
        name = f"deepspeed_config.offload_{part}_device"
        if keys.given.get(name) in ("cpu", "nvme"):
            keys.put("sharding.deepspeed", policy, name)


def _experts(keys: Keys) -> None:
    """Set KTransformers' experts, which the host holds and computes in 16 bits or in whole numbers."""
    name = "kt_config.kt_backend"
    kind = str(keys.given.get(name) or "").lower()
    if kind in _IN_WHOLE_NUMBERS:
        keys.put("quant.type", _IN_WHOLE_NUMBERS[kind], name)
        keys.note(name, "There only the experts have so many bits, in whole numbers; here all linear layers do.")
    elif kind and kind != "amxbf16":
        keys.lose(name, "The base is in 16 bits, or in 8 or 4 by quant.type.")
