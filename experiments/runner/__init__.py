"""How a command becomes jobs, and what they leave: command line, folders, progress, sweeps."""
