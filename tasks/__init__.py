"""seqio task registrations, installed as `rest_jax.tasks`. Importing a module registers its tasks; this package itself imports nothing."""
