"""Ahead-of-time compilation: a run's programs, compiled for a TPU topology on a machine without a TPU."""
