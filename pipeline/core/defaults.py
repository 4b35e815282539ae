"""Folders that commands read and write where nobody names another, and numbers that several stages agree on.

Nothing is imported here but paths, so that every module may import it.
"""

from pathlib import Path

DATA = Path("data/coco")
STORES = Path("data/cache")
RUNS = Path("runs")
ABLATIONS = RUNS / "ablations"
REPORT = Path("report")
# Captions kept of an image; COCO has five or a few more.
CAPTIONS = 5
