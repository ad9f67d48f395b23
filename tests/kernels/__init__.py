"""Proofs of our Triton kernels without a GPU, each a process, because Triton reads the environment once.

TRITON_INTERPRET=1 python -m tests.kernels.interpret    values, in Triton's interpreter on a CPU
python -m tests.kernels                                 machine code for GPUs of three generations
"""
