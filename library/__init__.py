"""The library: a trained network, and samplers fitted to it."""
