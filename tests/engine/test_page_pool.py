import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.engine.scheduler.pool import PagePool
from rekindle.errors import InternalError


def test_pages_are_given_out_once_each_until_none_is_free():
    pool = PagePool(5)
    first, second = pool.allocate(2), pool.allocate(3)
    assert first is not None
    assert second is not None
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0
    assert pool.allocate(1) is None


def test_an_allocation_that_does_not_fit_takes_nothing():
    pool = PagePool(3)
    assert pool.allocate(4) is None
    assert pool.num_free == 3


def test_nothing_can_always_be_allocated():
    assert PagePool(0).allocate(0) == ()


def test_a_shared_page_is_free_only_after_its_last_holder_lets_go():
    pool = PagePool(1)
    assert pool.allocate(1) == (0,)
    pool.retain(0)
    assert pool.release(0) == 1
    assert pool.num_free == 0
    assert pool.release(0) == 0
    assert pool.num_free == 1


def test_releasing_a_free_page_is_a_reported_bug():
    pool = PagePool(2)
    with pytest.raises(InternalError, match="page 1 was released more often than it was held"):
        pool.release(1)
    pool.check_integrity()


def test_sharing_a_free_page_is_a_reported_bug():
    with pytest.raises(InternalError, match="page 0 is free and cannot be shared"):
        PagePool(2).retain(0)


def test_a_row_is_the_first_that_is_long_enough():
    pool = PagePool(8)
    assert pool.allocate_row(3) == (0, 1, 2)
    assert pool.allocate(1) == (7,)
    pool.release(1)
    assert pool.allocate_row(1) == (1,)
    pool.release_all([0, 1])
    assert pool.allocate_row(4) == (3, 4, 5, 6)


def test_a_row_that_is_nowhere_is_pieced_together_in_rising_order():
    pool = PagePool(5)
    pool.allocate_row(5)
    pool.release_all([4, 0, 2])
    assert pool.allocate_row(3) == (0, 2, 4)
    assert pool.allocate_row(1) is None


_OPERATIONS = ["allocate", "allocate_row", "retain", "release"]


@given(st.lists(st.tuples(st.sampled_from(_OPERATIONS), st.integers(0, 6)), max_size=60))
def test_pages_are_conserved_whatever_is_done_with_them(operations):
    pool = PagePool(12)
    held: list[int] = []
    for operation, number in operations:
        if operation.startswith("allocate"):
            pages = getattr(pool, operation)(number)
            assert (pages is None) == (number > 12 - len(set(held)))
            assert not set(pages or ()) & set(held)
            held += pages or ()
        elif held:
            page = held[number % len(held)]
            if operation == "retain":
                pool.retain(page)
                held.append(page)
            else:
                held.remove(page)
                assert pool.release(page) == held.count(page)
        pool.check_integrity()
        assert pool.num_free == 12 - len(set(held))
