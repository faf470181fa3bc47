"""The ground floor: the files that travel, flat, into every published repository and run there as remote code."""
