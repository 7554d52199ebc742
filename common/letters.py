"""Define which letters the sentence encoder reads and which are not printed, and find what it ignores in a sentence."""
import re

CONTROL = re.compile(r'[\x00-\x1f\x7f-\x9f]')  # control characters, which a terminal may obey
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
