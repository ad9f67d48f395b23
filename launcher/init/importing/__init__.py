"""Configurations of axolotl, LLaMA-Factory, TRL, accelerate and torchtune as ours: tables in
trainer/config/peers/*.yaml, and what keys make together here.
"""
