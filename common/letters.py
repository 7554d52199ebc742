"""The letters that the sentence encoder reads, and what of a sentence it therefore never sees."""

LENGTH = 201  # characters of a sentence that are read
# The minus is in it twice; as in the authors' table of letters, the later place counts and the first stays unused.
ALPHABET = 'abcdefghijklmnopqrstuvwxyz0123456789-,;.!?:\'"/\\|_@#$%^&*~`+-=<>()[]{} '


def unread(text):
    """What the sentence encoder does not read of `text`: (set of characters, number of characters after the 201st).

    The set holds the lower-cased characters, among those before the end of what is read, that the alphabet lacks.
    """
    text = text.lower()
    return set(text[:LENGTH]) - set(ALPHABET), max(0, len(text) - LENGTH)
