"""Which ranks may share a row. No torch."""


def uneven_ranks(size: int, world_size: int, ranks_per_node: int) -> str | None:
    """Why these ranks cannot share rows, `size` ranks each, in a sentence; None if they can."""
    per_node = min(world_size, ranks_per_node)
    if world_size % size:
        return (
            f"sharding.sequence_parallel: {size} ranks share each row, and {world_size} ranks are no multiple of {size}. Change cluster.workers, or set a divisor of "
            f"{world_size}."
        )
    if per_node % size:
        return (
            f"sharding.sequence_parallel: the {size} ranks that share a row must be on one node, and {per_node} ranks of a node are no multiple of {size}. Set a "
            f"divisor of {per_node}."
        )
    return None
