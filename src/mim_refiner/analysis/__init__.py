"""What measured results mean: curves over blocks, and whether refinement helped."""
