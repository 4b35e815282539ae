"""COCO, the user's own files or the generated miniature, to one manifest."""
