"""New images to tags, with the neighbours that voted; the index file."""
