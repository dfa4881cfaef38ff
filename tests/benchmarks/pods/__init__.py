"""The table of pods: what each public model takes on each TPU, compiled ahead of time."""
