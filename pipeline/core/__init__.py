"""What every stage stands on: configuration, device, console, and the run folder with what lies in it."""
