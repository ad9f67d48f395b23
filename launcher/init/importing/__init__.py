"""Turns configurations of axolotl, LLaMA-Factory, TRL, accelerate, ms-swift and NeMo Automodel into ours.

The tables of keys are in trainer/config/peers/*.yaml. This package has the settings that several keys make together.
"""
