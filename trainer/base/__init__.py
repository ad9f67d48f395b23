"""A base: where it is, what it is made of, how its stored bytes become this rank's share."""
