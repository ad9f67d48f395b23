"""The parts that several methods are made of. None of them is a method."""
