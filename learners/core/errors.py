"""What can go wrong, by name."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting that cannot be used; the message says which and what is allowed."""


class LearnersParted(RuntimeError):
    """One of several learners ended, or did not come to where the others waited for it."""


class NonFiniteError(ArithmeticError):
    """A tensor holds NaN or infinity.

    Attributes:
        tensor: its name.
        member: index of the first member concerned, or None where it belongs to all.
    """

    def __init__(self, tensor: str, member: int | None = None) -> None:
        self.tensor = tensor
        self.member = member
        place = "" if member is None else f" of member {member}"
        super().__init__(f"{tensor}{place} is not finite")

    def __reduce__(self) -> tuple[type[NonFiniteError], tuple[str, int | None]]:
        return (NonFiniteError, (self.tensor, self.member))
