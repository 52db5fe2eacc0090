"""Samples against data: feature spaces, reference statistics, distances, the metrics."""
