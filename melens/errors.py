"""The one exception type that a user's mistake raises."""

__all__ = ["MelensError"]


class MelensError(ValueError):
    """A mistake of the caller's, in one sentence: what was wrong and what is allowed."""
