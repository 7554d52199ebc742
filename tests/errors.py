"""What a person sees when something is wrong."""
import pytest

from common.errors import UserError


def one_line(call, *args, match=None):
    """The message of the UserError that `call(*args)` raises: one line, and it fits the pattern `match`."""
    with pytest.raises(UserError, match=match) as caught:
        call(*args)
    assert '\n' not in str(caught.value)
    return str(caught.value)
