"""How a frozen weight is held in memory."""
