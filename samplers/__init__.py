"""Samplers: whole recipes from a method's prior to data; `sampling.SAMPLERS` lists them."""
