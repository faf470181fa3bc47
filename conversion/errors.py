"""What a person, or a file from a stranger, got wrong."""


class ConversionError(ValueError):
    """One sentence for the user: what was wrong, where, and what to do. The command prints it and exits with 2."""
