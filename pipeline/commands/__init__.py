"""The commands: each parses its options, calls one stage and prints. :mod:`mmcli.cli` puts them together."""
