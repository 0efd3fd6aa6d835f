"""A case of a parametrized test that is not repeated with the newest jax, because another case beside it is."""

import pytest


def variant(*values, id=None):
    return pytest.param(*values, id=id, marks=pytest.mark.variant)
