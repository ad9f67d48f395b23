"""The command line, Ray and status: this package starts ranks and looks at runs. It imports no torch."""
