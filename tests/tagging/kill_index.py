"""Writes two indexes in turn over one file for ever, until somebody kills it; torch is never imported."""

import sys
from pathlib import Path

from mmcli.pipeline.tagging.index_file import read_index, write_index, writing

path = Path(sys.argv[1])
a, b = (read_index(Path(name))[0] for name in sys.argv[2:4])
assert "torch" not in sys.modules
sys.stdout.write("ready\n")
sys.stdout.flush()
while True:
    for index in (b, a):
        with writing(path):
            write_index(path, index)
