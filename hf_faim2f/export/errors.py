"""What a person asked of an export that cannot be."""


class ExportError(ValueError):
    """One sentence for the user: what was wrong, where, and what to do. The command prints it and exits with 2."""
