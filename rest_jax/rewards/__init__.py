"""In-graph rewards of sampled translations."""
