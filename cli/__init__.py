"""What the command line of ipl.py needs around the method: checks, processes, the run folder."""
