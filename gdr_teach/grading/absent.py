"""What stands in for Triton where it is not installed, so that cells still run: a kernel is then only text."""

from types import SimpleNamespace

tl = SimpleNamespace(constexpr=object)


def kernel(function):
    """The function as it is. Its check answers "not verified here"."""
    return function
