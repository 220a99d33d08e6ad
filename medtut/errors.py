"""Errors whose text is meant for the person at the keyboard."""


class MedtutError(Exception):
    """Something the user can put right.

    The message says what is wrong, where, and what to do. The command line prints it
    without a traceback and leaves with exit code 2.
    """
