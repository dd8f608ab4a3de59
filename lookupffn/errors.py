"""What is refused, and the one form in which: a name, its value and what would be right."""


class InputError(ValueError):
    """Input that is refused; the message names it, its value and what to do."""


class PackedError(InputError):
    """Packed bytes that are damaged, of another version, or not of this format."""


class WriteError(InputError, OSError):
    """A file or folder that was asked for cannot be written: the disk is full, the folder read-only or not there."""


def check(fits: bool, name: str, value: object, expected: str, error: type[ValueError] = ValueError) -> None:
    """Raises ``error``, with name, value and what would be right, unless the value ``fits``."""
    if not fits:
        raise error(f"{name} must be {expected}, not {value!r}")
