"""The keys of ms-swift's trainer over Megatron that make settings together."""

from launcher.init.importing import joint_settings, ms_swift
from launcher.init.importing.mapping import Keys
from trainer.config.peers import conversions as to


def join(keys: Keys) -> None:
    """Make all settings that several keys make together."""
    joint_settings.devices(keys)
    ms_swift.begin(keys)
    if "train.steps" in keys.settings:
        keys.spare("train.epochs", "train_iters limits the run: train.steps.")
    joint_settings.betas(keys)
    if keys.given.get("min_lr") and (rate := keys.settings.get("optim.lr")):
        keys.attempt("min_lr", lambda: {"optim.min_lr_ratio": round(to.number(keys.given["min_lr"]) / rate, 12)})
    elif keys.given.get("min_lr"):
        keys.lose("min_lr", "It is a share of the rate, optim.min_lr_ratio, and the rate cannot be read.")
    else:
        keys.assume("optim.min_lr_ratio", 0.0, "Megatron's rate ends at min_lr, which is 0 where none is given")
    joint_settings.evaluating_and_saving(keys)
    joint_settings.pairs(keys, "max_length")
    joint_settings.head(keys)
    joint_settings.tokens(keys, "new_special_tokens")
    joint_settings.tracking(keys)
    ms_swift.finish(keys)
