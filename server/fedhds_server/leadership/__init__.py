"""Which of several coordinators leads, what the port answers meanwhile, and whether the process could do its work."""
