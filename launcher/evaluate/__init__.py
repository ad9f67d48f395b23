"""`capstan evaluate` and `capstan generate`: a run's model on this machine's devices, and its answers on the
terminal.
"""
