"""Everything DeepSpeed: the policy, partitions and the engine. Nothing else imports it."""
