"""Several ranks as real processes on this machine, joined by gloo."""
