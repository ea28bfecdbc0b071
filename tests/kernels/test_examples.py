"""The examples in the docstrings of efface_kernels run and print what they show."""

import doctest

import pytest

import efface_kernels


@pytest.mark.parametrize("name", ["linear_distribution_loss", "linear_logprob", "linear_sequence_loss", "row_pass"])
def test_the_docstring_has_an_example_that_runs(name: str) -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(
        getattr(efface_kernels, name), name, efface_kernels, globs={}
    )
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
