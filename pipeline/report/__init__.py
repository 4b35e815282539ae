"""Read runs, compare them, and render one page."""
