"""The commands of `faim2f`, one a file."""
