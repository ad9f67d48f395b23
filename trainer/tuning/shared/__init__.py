"""The parts that several methods share. A method imports its parts; a part imports no method and has no `METHODS`."""
