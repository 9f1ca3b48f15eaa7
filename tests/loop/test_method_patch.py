"""A patched method does what was asked, and comes off in any order, whoever has wrapped it since."""

import copy
import itertools
import pickle

import pytest

from kspec_guidance.loop.scheduler_hook import MethodPatch


class Owner:
    def step(self, x, *, more=0):
        """What the method says of itself."""
        return ["own", x + more]


def adds(name):
    return lambda original: lambda *args, **kwargs: [name, *original(*args, **kwargs)]


def patch(owner, name, tag=None):
    return MethodPatch(owner, "step", adds(name), tag)


def test_a_patch_wraps_the_method_and_removing_it_leaves_the_object_as_it_was():
    owner = Owner()
    found = patch(owner, "a")
    assert owner.step(1, more=2) == ["a", "own", 3]
    assert owner.step.__doc__ == Owner.step.__doc__
    found.remove()
    found.remove()
    assert owner.step(1) == ["own", 1]
    assert vars(owner) == {}


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_patches_come_off_in_any_order(order):
    owner = Owner()
    patches = [patch(owner, name) for name in "abc"]
    left = ["c", "b", "a"]
    assert owner.step(0) == [*left, "own", 0]
    for k in order:
        patches[k].remove()
        left.remove("abc"[k])
        assert owner.step(0) == [*left, "own", 0]
    assert vars(owner) == {}


def test_a_removed_patch_under_someone_elses_wrapper_passes_calls_through():
    owner = Owner()
    ours = patch(owner, "ours")
    below = owner.step
    owner.step = lambda *args, **kwargs: ["theirs", *below(*args, **kwargs)]
    assert owner.step(0) == ["theirs", "ours", "own", 0]
    ours.remove()
    assert owner.step(0) == ["theirs", "own", 0]
    owner.step = below  # they put back what they found
    assert owner.step(0) == ["own", 0]
    assert below(0) == ["own", 0]  # also for someone who still holds it
    again = patch(owner, "again")  # what was removed does not count
    assert owner.step(0) == ["again", "own", 0]
    again.remove()
    assert vars(owner) == {}


def test_an_instance_attribute_that_was_there_is_put_back():
    owner = Owner()
    owner.step = mine = lambda x: ["mine", x]
    found = patch(owner, "a")
    assert owner.step(0) == ["a", "mine", 0]
    found.remove()
    assert owner.step is mine


def test_two_tags_on_one_method_are_refused_also_through_a_wrapper():
    owner, first, second = Owner(), object(), object()
    ours = patch(owner, "a", first)
    patch(owner, "b", first).remove()
    with pytest.raises(ValueError, match=r"combine the two with `guide \+ other`"):
        patch(owner, "c", second)
    below = owner.step
    owner.step = lambda *args, **kwargs: below(*args, **kwargs)
    with pytest.raises(ValueError, match="already guided by another guide"):
        patch(owner, "c", second)
    ours.remove()
    patch(owner, "c", second).remove()


def test_copies_and_pickles_have_the_method_itself():
    owner = Owner()
    patch(owner, "a")
    assert copy.deepcopy(owner).step(0) == ["own", 0]
    assert pickle.loads(pickle.dumps(owner)).step(0) == ["own", 0]
    assert owner.step(0) == ["a", "own", 0]
