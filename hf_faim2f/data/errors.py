"""What is wrong with a data set."""


class DatasetError(ValueError):
    """A file of a data set cannot be used. One sentence: which file, what is wrong with it, what to do."""
