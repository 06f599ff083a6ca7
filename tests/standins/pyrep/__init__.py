"""Stand-in for PyRep."""
