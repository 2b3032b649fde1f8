"""API servers and the command line: flags, checks of requests, status, metrics."""
