"""Processes that work as one: how they were started, and a watch for one that hangs."""
