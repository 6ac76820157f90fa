"""What the stack raises."""


class StackError(Exception):
    """The stack did not come up, or not as asked. The message says expected, found, and what to do."""
