"""The error that a user can act on, and texts as one line of a terminal."""


class UserError(Exception):
    """An error that the user can fix: one line that says what was found, what was expected, what to do."""


def one_line(text: object) -> str:
    """A text as one line for a terminal, without newlines and control characters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())


def reason(error: BaseException) -> str:
    """The message of an error as one short line; its type where it has none."""
    return one_line(error)[:200] or type(error).__name__


def valid_unicode(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, which tokenizers and files do not accept."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the machine or of a device is used up."""
    phrases = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")  # torch's
    said = isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)
    return said or isinstance(error, MemoryError)
