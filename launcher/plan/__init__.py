"""`capstan plan`: what a run needs, on which GPUs, how long it takes, and what it costs."""
