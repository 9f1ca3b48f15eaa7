"""Wrapping a method, and removing patches in any order, with foreign wrappers above them."""

import copy
import itertools
import pickle

import pytest

from kspec_guidance.loop.scheduler_hook import MethodPatch


class Owner:
    def step(self, x, *, extra=0):
        """Docstring of the method."""
        return ["own", x + extra]


def prepend(name):
    return lambda original: lambda *args, **kwargs: [name, *original(*args, **kwargs)]


def patch(owner, name, tag=None):
    return MethodPatch(owner, "step", prepend(name), tag)


def test_patch_wraps_method_and_remove_restores_object():
    owner = Owner()
    method_patch = patch(owner, "a")
    assert owner.step(1, extra=2) == ["a", "own", 3]
    assert owner.step.__doc__ == Owner.step.__doc__
    method_patch.remove()
    method_patch.remove()
    assert owner.step(1) == ["own", 1]
    assert vars(owner) == {}


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_patches_can_be_removed_in_any_order(order):
    owner = Owner()
    patches = [patch(owner, name) for name in "abc"]
    remaining = ["c", "b", "a"]
    assert owner.step(0) == [*remaining, "own", 0]
    for k in order:
        patches[k].remove()
        remaining.remove("abc"[k])
        assert owner.step(0) == [*remaining, "own", 0]
    assert vars(owner) == {}


def test_removed_patch_below_foreign_wrapper_passes_calls_through():
    owner = Owner()
    own_patch = patch(owner, "ours")
    patched_step = owner.step
    owner.step = lambda *args, **kwargs: ["theirs", *patched_step(*args, **kwargs)]
    assert owner.step(0) == ["theirs", "ours", "own", 0]
    own_patch.remove()
    assert owner.step(0) == ["theirs", "own", 0]
    owner.step = patched_step  # the foreign wrapper restores the method it replaced
    assert owner.step(0) == ["own", 0]
    assert patched_step(0) == ["own", 0]  # also through a reference kept elsewhere
    new_patch = patch(owner, "again")  # removed patches are not counted
    assert owner.step(0) == ["again", "own", 0]
    new_patch.remove()
    assert vars(owner) == {}


def test_remove_restores_instance_attribute():
    owner = Owner()
    owner.step = instance_step = lambda x: ["mine", x]
    method_patch = patch(owner, "a")
    assert owner.step(0) == ["a", "mine", 0]
    method_patch.remove()
    assert owner.step is instance_step


def test_second_tag_raises_even_through_wrapper():
    owner, first, second = Owner(), object(), object()
    own_patch = patch(owner, "a", first)
    patch(owner, "b", first).remove()
    with pytest.raises(ValueError, match=r"combine the two with `guide \+ other`"):
        patch(owner, "c", second)
    patched_step = owner.step
    owner.step = lambda *args, **kwargs: patched_step(*args, **kwargs)
    with pytest.raises(ValueError, match="already guided by another guide"):
        patch(owner, "c", second)
    own_patch.remove()
    patch(owner, "c", second).remove()


def test_copies_and_pickles_are_unpatched():
    owner = Owner()
    patch(owner, "a")
    assert copy.deepcopy(owner).step(0) == ["own", 0]
    assert pickle.loads(pickle.dumps(owner)).step(0) == ["own", 0]
    assert owner.step(0) == ["a", "own", 0]
