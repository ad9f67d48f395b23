"""`capstan doctor`: this machine, and the network between machines."""
