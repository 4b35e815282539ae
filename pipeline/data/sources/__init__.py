"""Readers of the forms in which data sets lie around; each gives the same thing, ``samples.Samples``."""
