"""seqio task registrations, installed as `rest_jax.tasks`: importing a module registers its tasks."""
