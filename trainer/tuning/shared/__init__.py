"""The parts that several methods are made of. A method knows its parts; they know no method, and have no `METHODS`."""
