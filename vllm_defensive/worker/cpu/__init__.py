"""Workers on CPUs."""
