"""The state that learns: sharded over the ranks by ZeRO-3, updated by an optimizer, and checkpointed for any number of
ranks.
"""
