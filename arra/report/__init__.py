"""What a person looks at: curves, grids of pictures and the one-file report."""
