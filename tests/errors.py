"""Check error messages."""
import pytest

from common.errors import UserError


def one_line(call, *args, match=None):
    """Return the message of the UserError that `call(*args)` raises: one line that matches `match`."""
    with pytest.raises(UserError, match=match) as caught:
        call(*args)
    assert '\n' not in str(caught.value)
    return str(caught.value)
