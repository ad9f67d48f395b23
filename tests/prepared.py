"""Imported once, by the server that ranks and commands are forked from: what they import sooner or later, which takes
seconds.

A module that is missing here costs each of them its import, and one that is no more is passed over; nothing else
depends on it.
"""

import gc
import logging
import pkgutil
import sys
from contextlib import suppress
from importlib import import_module

import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import launcher
import trainer

# Ray is left out: it reads the environment of its processes when it is imported, and here that is the server's.
WITHOUT = ("launcher.cluster.ray", "launcher.drive", "launcher.smoke")
PACKAGES = [
    f"{root.__name__}.{room.name}"
    for root in (trainer, launcher)
    for room in pkgutil.iter_modules(root.__path__)
    if room.ispkg
]
MODULES = (
    "trainer.rank",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "bitsandbytes",
    "peft.tuners.lora.bnb",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.moe.ep_experts",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "encodings.idna",
    "numpy.ma",
    "safetensors.torch",
    "torch.profiler",
)

found = [
    module.name
    for package in PACKAGES
    for module in pkgutil.walk_packages(import_module(package).__path__, f"{package}.")
    if not module.name.startswith(WITHOUT)
]
logging.disable(logging.WARNING)  # bitsandbytes misses a library, and would say so among pytest's lines
for name in (*MODULES, *found):
    with suppress(ImportError):  # of a library that this machine does not have
        import_module(name)
logging.disable(logging.NOTSET)
assert "ray" not in sys.modules
# How transformers renames stored weights: it compiles the patterns of all its classes when it is first asked.
get_checkpoint_conversion_mapping("llama")
# DeepSpeed writes the values of all parameters into a line that nobody sees.
torch.set_printoptions(threshold=0, edgeitems=1)
# The garbage collector leaves all that alone from now on, in the server and in the ranks, which share it as long as
# nobody writes.
gc.collect()
gc.freeze()
