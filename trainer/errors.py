"""The root of all errors that a user can cause and mend."""


class StrataError(Exception):
    """Report a request that cannot be carried out.

    The message names the value received, what is allowed and what to change; commands print it without a traceback.
    Every error class of this package that reaches a user derives from this one.
    """
