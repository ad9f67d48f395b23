"""Configurations of axolotl, LLaMA-Factory, TRL and accelerate as ours: tables in
trainer/config/peers/*.yaml, and what keys make together here.
"""
