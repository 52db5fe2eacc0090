"""Output for people: grids of images, plots, a table, and the page of an evaluation."""
