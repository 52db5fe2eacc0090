"""The files of a run: complete or absent, written by one process at a time."""
