"""How a frozen weight is held in memory: held.py is the seam, formats/ has a file for each way, layers.py the modules,
blockwise.py bitsandbytes' arithmetic and codes.py the facts of codes that files have."""
