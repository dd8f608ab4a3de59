"""The one form in which a value out of range is refused."""


def check(fits: bool, name: str, value: object, expected: str, error: type[ValueError] = ValueError) -> None:
    """Raises ``error``, with name, value and what would be right, unless the value ``fits``."""
    if not fits:
        raise error(f"{name} must be {expected}, not {value!r}")
