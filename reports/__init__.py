"""What a person looks at: grids of images, plots, a table, and the page of an evaluation."""
