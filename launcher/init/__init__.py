"""A first configuration, from a few answers and the plan, or from the file of another tool (importing/)."""
