"""Check the values of flags: argparse types, which need no PyTorch."""
import argparse
import os
import unicodedata

LARGEST = 2 ** 31 - 1      # number that a flag takes: larger ones are typing errors, and overflow
LONGEST_NAME = 100         # bytes; a date and an extension are added, and file systems allow 255


def positive(number):
    """Return an argparse type for numbers above zero: `positive(int)` or `positive(float)`."""
    return _checked(number, 'positive', lambda value: value > 0, 'is not above zero')


def non_negative(number):
    """Return an argparse type for numbers of at least zero: `non_negative(int)` or `non_negative(float)`."""
    return _checked(number, 'non-negative', lambda value: value >= 0, 'is below zero')


def up_to(most):
    """Return an argparse type for whole numbers from 1 to `most`."""
    return _checked(int, 'small', lambda value: 0 < value <= most, f'is not between 1 and {most}')


def fraction(text):
    """Convert text to a number from 0 to below 1 (an argparse type)."""
    return _checked(float, 'fraction', lambda value: 0 <= value < 1, 'is not between 0 and 1')(text)


def _checked(number, kind, is_fine, complaint):
    """Return an argparse type that refuses NaN, numbers that are too large, and those for which `is_fine` is false."""
    def parse(text):
        value = number(text)
        if value != value:
            raise argparse.ArgumentTypeError(f'{text} is not a number')
        if not is_fine(value):
            raise argparse.ArgumentTypeError(f'{text} {complaint}')
        if value > LARGEST:
            raise argparse.ArgumentTypeError(f'{text[:40]} is too large')
        return value
    parse.__name__ = f'{kind} {number.__name__}'
    return parse


def is_valid_text(text):
    """Return False for text with control characters, which a terminal would obey, or with bytes that were not UTF-8."""
    return not any(unicodedata.category(letter) in ('Cc', 'Cs') for letter in text)


def plain_name(text):
    """Check text as an argparse type: the name of a file or folder, not a path."""
    is_too_long = len(os.fsencode(text)) > LONGEST_NAME
    if not text.strip(' .') or set(text) & set('/\\') or not is_valid_text(text) or is_too_long:
        raise argparse.ArgumentTypeError(f'{text[:100]!r} cannot be the name of a file or folder')
    return text


def path(text):
    """Check text as an argparse type: any path except '', which is often an unset variable of the shell."""
    if not text:
        raise argparse.ArgumentTypeError('is empty; leave out the flag, or give a path')
    return os.path.expanduser(text)  # which the shell does not do in --flag=~/x


def absolute_path(text):
    """Convert text to an absolute path (an argparse type)."""
    return os.path.abspath(path(text))
