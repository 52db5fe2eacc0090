"""Objectives: what a training step minimises; `losses.OBJECTIVES` lists them."""
