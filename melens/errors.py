"""The one exception type that a user's mistake raises."""

__all__ = ["MelensError"]


class MelensError(ValueError):
    """A mistake of the caller's, in one sentence: what was wrong and what is allowed.

    Example:
        >>> melens.WeMask(rate=2)
        Traceback (most recent call last):
            ...
        melens.errors.MelensError: The mask's rate is 2; it must be a number from 0 to 1.
    """
