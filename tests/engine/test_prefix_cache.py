import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.engine.scheduler.eviction import DECAY_S
from rekindle.engine.scheduler.pool import PagePool
from rekindle.engine.scheduler.prefix import PrefixCache, page_digest, root_digest
from rekindle.errors import InternalError
from rekindle.protocol.identity import AdapterDigest, ModelDigest


def chain(*pages, adapter=None, salt="", base="base"):
    """Digests of successive pages of tokens."""
    digests = []
    parent = root_digest(ModelDigest(base), None if adapter is None else AdapterDigest(adapter), salt)
    for tokens in pages:
        parent = page_digest(parent, tokens)
        digests.append(parent)
    return digests


def fill(cache, pool, digests, now=0):
    """Cache one new page for each digest, used by nobody."""
    pages = pool.allocate(len(digests))
    insert(cache, digests, pages)
    cache.release(pages, now)
    return pages


def insert(cache, digests, pages, parent=None):
    for digest, page in zip(digests, pages, strict=True):
        assert cache.insert(digest, page, parent)
        parent = page


def evict_next(cache):
    """Evict the page that goes first."""
    _, page = next(cache.in_order())
    cache.evict(page)
    return page


ROOT_FIELDS = st.tuples(st.text(max_size=4), st.one_of(st.none(), st.text(max_size=4)), st.text(max_size=4))


@given(ROOT_FIELDS, ROOT_FIELDS)
def test_two_roots_are_equal_only_if_every_field_is(one, other):
    assert (root_digest(*one) == root_digest(*other)) == (one == other)


def test_no_field_of_a_root_runs_into_the_next():
    variants = [
        ("ab", "c", ""),
        ("a", "bc", ""),
        ("abc", "", ""),
        ("abc", None, ""),
        ("ab", None, "c"),
        ("", "ab", "c"),
    ]
    digests = {root_digest(ModelDigest(base), adapter, salt) for base, adapter, salt in variants}
    assert len(digests) == len(variants)


def test_a_salt_with_lone_surrogates_is_a_salt_like_any_other():
    assert root_digest(ModelDigest("base"), None, "\ud800") != root_digest(ModelDigest("base"), None, "\ud801")


@pytest.mark.parametrize("other", [{"adapter": "x"}, {"salt": "tenant"}, {"base": "another"}])
def test_the_same_tokens_under_another_root_are_not_found(other):
    pool = PagePool(4)
    cache = PrefixCache(pool)
    fill(cache, pool, chain((1, 2)))
    assert cache.match(chain((1, 2))) != ()
    assert cache.match(chain((1, 2), **other)) == ()


def test_a_lookup_finds_the_longest_prefix():
    pool = PagePool(4)
    cache = PrefixCache(pool)
    pages = fill(cache, pool, chain((1, 2), (3, 4), (5, 6)))
    assert cache.match(chain((1, 2), (3, 4), (9, 9))) == pages[:2]
    assert cache.match(chain((9, 9), (3, 4))) == ()


def test_a_page_in_use_is_not_idle_and_a_page_given_back_stays_cached():
    pool = PagePool(2)
    cache = PrefixCache(pool)
    (page,) = fill(cache, pool, chain((1, 2)))
    assert (cache.num_idle, pool.num_free) == (1, 1)
    cache.use((page,))
    assert cache.num_idle == 0
    with pytest.raises(InternalError, match=f"page {page} is no idle leaf"):
        cache.evict(page)
    cache.release((page,), 1)
    assert (cache.num_idle, pool.num_free) == (1, 1)


def test_of_pages_used_once_the_one_used_longest_ago_is_evicted_first_and_leaves_go_before_parents():
    pool = PagePool(4)
    cache = PrefixCache(pool)
    old = fill(cache, pool, chain((1, 1), (2, 2)), now=1)
    new = fill(cache, pool, chain((3, 3), (4, 4)), now=2)
    cache.use(old[:1])
    cache.release(old[:1], 3)
    planned = [page for _, page in cache.in_order()]
    order = []
    while cache.num_idle:
        order.append(evict_next(cache))
        cache.check_integrity()
    assert order == planned == [old[1], new[1], new[0], old[0]]
    assert pool.num_free == 4


def test_a_page_that_many_used_outlives_one_that_was_used_last():
    pool = PagePool(2)
    cache = PrefixCache(pool)
    popular = fill(cache, pool, chain((1, 1)), now=1)
    for now in (2, 3):
        cache.use(popular)
        cache.release(popular, now)
    (latest,) = fill(cache, pool, chain((2, 2)), now=4)
    assert evict_next(cache) == latest


def test_a_page_that_was_popular_is_forgotten_in_time():
    pool = PagePool(2)
    cache = PrefixCache(pool)
    popular = fill(cache, pool, chain((1, 1)), now=1)
    for now in (2, 3):
        cache.use(popular)
        cache.release(popular, now)
    fill(cache, pool, chain((2, 2)), now=4 + 2 * DECAY_S)
    assert evict_next(cache) == popular[0]


def test_only_a_page_that_no_cached_page_follows_can_be_evicted():
    pool = PagePool(2)
    cache = PrefixCache(pool)
    first, second = fill(cache, pool, chain((1, 1), (2, 2)))
    with pytest.raises(InternalError, match=f"page {first} is no idle leaf"):
        cache.evict(first)
    cache.evict(second)
    cache.evict(first)
    assert pool.num_free == 2


def test_a_second_page_of_the_same_content_is_not_cached():
    pool = PagePool(2)
    cache = PrefixCache(pool)
    (first,) = fill(cache, pool, chain((1, 2)))
    (second,) = pool.allocate(1)
    assert not cache.insert(chain((1, 2))[0], second, None)
    cache.release((second,), 1)
    assert pool.num_free == 1
    assert cache.match(chain((1, 2))) == (first,)


@given(
    st.lists(
        st.tuples(st.sampled_from(["run", "end", "evict"]), st.lists(st.integers(0, 1), max_size=4)),
        max_size=60,
    )
)
def test_users_always_use_the_parents_of_their_pages(operations):
    pool = PagePool(16)
    cache = PrefixCache(pool)
    users: list[tuple[int, ...]] = []
    for now, (operation, tokens) in enumerate(operations):
        if operation == "run":
            digests = chain(*((token,) for token in tokens))
            cached = cache.match(digests)
            cache.use(cached)
            fresh = pool.allocate(len(digests) - len(cached))
            if fresh is None:
                cache.release(cached, now)
                continue
            insert(cache, digests[len(cached) :], fresh, cached[-1] if cached else None)
            users.append(cached + fresh)
        elif operation == "end" and users:
            cache.release(users.pop(sum(tokens) % len(users)), now)
        elif operation == "evict" and cache.num_idle:
            planned = [page for _, page in cache.in_order()]
            assert sorted(planned) == sorted(set(planned))
            assert len(planned) == cache.num_idle
            assert evict_next(cache) == planned[0]
            assert [page for _, page in cache.in_order()] == planned[1:], "the order is what evicting one by one gives"
        cache.check_integrity()
        pool.check_integrity()
        in_use = {page for pages in users for page in pages}
        assert cache.num_idle == cache.num_cached - len(in_use)
        for tokens_a in ((0,), (1,)):
            assert cache.match(chain(tokens_a, (0,))) == () or cache.match(chain(tokens_a)) != ()
    for pages in users:
        cache.release(pages, len(operations))
    while cache.num_idle:
        evict_next(cache)
    assert pool.num_free == 16
