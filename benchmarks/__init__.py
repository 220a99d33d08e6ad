"""Measurements of speed and memory on one machine, their results, and the sweeps."""
