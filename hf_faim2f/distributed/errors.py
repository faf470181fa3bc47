"""What is wrong with a bulk run."""


class BulkError(ValueError):
    """A bulk run cannot begin or go on. One sentence: what is wrong, where, and what to do."""
