"""What can be found out about a sharded model without training it: likelihoods, answers, tasks."""
