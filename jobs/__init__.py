"""Ray programs over `parakeet_core`: all I/O of the project is here."""
