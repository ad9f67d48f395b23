"""The command line, Ray, status: what starts ranks and looks at runs. Imports no torch."""
