"""Stage by stage: the only place that knows data sets, files and models together."""
