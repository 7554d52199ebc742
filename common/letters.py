"""Define which letters the sentence encoder reads, and find what it ignores in a sentence."""

LENGTH = 201  # characters of a sentence that are read
# The minus occurs twice; as in the authors' table of letters, its later position counts and the first one is unused.
ALPHABET = 'abcdefghijklmnopqrstuvwxyz0123456789-,;.!?:\'"/\\|_@#$%^&*~`+-=<>()[]{} '


def unread(text):
    """Return what the sentence encoder ignores in `text`: (set of characters, number of characters after the 201st).

    The set holds the lower-cased characters, among the first 201, that are not in the alphabet.
    """
    text = text.lower()
    return set(text[:LENGTH]) - set(ALPHABET), max(0, len(text) - LENGTH)


def is_readable(text):
    """Return whether the sentence encoder reads anything of `text` but spaces."""
    return bool(set(text.lower()[:LENGTH]) & set(ALPHABET) - {' '})
