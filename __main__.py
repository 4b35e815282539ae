"""``python -m mmcli`` and the console script ``mmcli`` are the same."""

from mmcli.cli import main

if __name__ == "__main__":
    main()
