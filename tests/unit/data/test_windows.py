import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp.data import TokenWindows, batch_indices, batches, make_tokenizer, tokenise
from offramp.errors import ConfigError

# Batches.


@given(st.integers(0, 100), st.integers(1, 12), st.integers(1, 5), st.one_of(st.none(), st.just(3)))
def test_every_token_but_the_first_is_a_target_once(length, seq_len, batch_size, seed):
    ids = torch.arange(length)
    order = None if seed is None else torch.Generator().manual_seed(seed)
    seen = []
    for inputs, targets in batches(ids, seq_len=seq_len, batch_size=batch_size, order=order):
        assert inputs.shape == targets.shape
        assert 1 <= inputs.shape[0] <= batch_size
        assert 1 <= inputs.shape[1] <= seq_len
        assert torch.equal(inputs + 1, targets)
        seen += targets.flatten().tolist()
    assert (seen if order is None else sorted(seen)) == list(range(1, length))


@given(st.integers(0, 100), st.integers(1, 12), st.integers(1, 5))
def test_drop_last_leaves_whole_batches_of_whole_windows(length, seq_len, batch_size):
    read = list(
        batches(torch.arange(length), seq_len=seq_len, batch_size=batch_size, drop_last=True)
    )
    expected = max(length - 1, 0) // seq_len // batch_size
    assert [x.shape for x, _ in read] == [(batch_size, seq_len)] * expected
    targets = [t for _, y in read for t in y.flatten().tolist()]
    assert targets == list(range(1, expected * batch_size * seq_len + 1))


def test_a_shuffled_order_is_a_repeatable_permutation_of_the_windows():
    ids = torch.arange(8 * 20 + 1)

    def windows(order):
        read = batches(ids, seq_len=8, batch_size=4, drop_last=True, order=order)
        return [row.tolist() for inputs, _ in read for row in inputs]

    plain = windows(None)
    generator = torch.Generator().manual_seed(7)
    first, second = windows(generator), windows(generator)
    assert sorted(first) == sorted(second) == plain
    assert len({str(plain), str(first), str(second)}) == 3  # a new order each epoch
    assert windows(torch.Generator().manual_seed(7)) == first


# Windows.


@given(st.integers(0, 100), st.integers(1, 12))
def test_windows_are_those_of_batches(length, seq_len):
    ids = torch.arange(length)
    windows = TokenWindows(ids, seq_len=seq_len)
    read = list(batches(ids, seq_len=seq_len, batch_size=1, drop_last=True))
    assert len(windows) == len(read)
    for (inputs, targets), (x, y) in zip(windows, read, strict=True):
        assert torch.equal(inputs, x[0])
        assert torch.equal(targets, y[0])


def test_windows_on_disk_cross_the_borders_of_shards(tmp_path):
    text = "".join(chr(32 + i % 90) for i in range(203))
    ids = torch.tensor(list(text.encode()))
    stored = tokenise(text, make_tokenizer("bytes", text), tmp_path, shard_tokens=7)
    assert len(stored.about["lengths"]) == 29
    memory, disk = (TokenWindows(tokens, seq_len=10) for tokens in (ids, stored))
    assert len(disk) == len(memory) == 20
    chosen = torch.tensor([19, 0, 7, 7])
    for mine, expected in zip(disk.batch(chosen), memory.batch(chosen), strict=True):
        assert mine.dtype == torch.long
        assert torch.equal(mine, expected)
    assert torch.equal(disk.batch([3])[1][0], ids[31:41])
    assert torch.equal(disk[-1][0], ids[190:200])


@pytest.mark.parametrize("index", [20, -21, 1000])
def test_a_window_that_is_not_there_is_an_index_error(index):
    with pytest.raises(IndexError, match="expected one of 20"):
        TokenWindows(torch.arange(203), seq_len=10)[index]


def test_a_window_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="seq_len: expected at least 1, got 0"):
        TokenWindows(torch.arange(3), seq_len=0)


# Who reads which window when.


def order(num_windows=50, **fields):
    settings = {"batch_size": 12, "seed": 3, "epoch": 0, "shuffle": True, **fields}
    return [batch.tolist() for batch in batch_indices(num_windows, **settings)]


def test_without_shuffling_the_windows_come_in_order_and_the_incomplete_batch_is_left_out():
    assert order(11, batch_size=4, shuffle=False) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert order(11, batch_size=4, shuffle=False, epoch=5) == order(11, batch_size=4, shuffle=False)
    assert order(3, batch_size=4) == []


def test_a_shuffled_epoch_reads_each_window_at_most_once_and_orders_differ():
    orders = {(seed, epoch): order(seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)}
    for batch in orders.values():
        assert [len(part) for part in batch] == [12] * 4
        read = [window for part in batch for window in part]
        assert len(set(read)) == 48
        assert set(read) <= set(range(50))
        assert read != sorted(read)
    assert len({str(batch) for batch in orders.values()}) == 4


def test_the_order_is_written_down():  # a resumed run must read what the first would have
    assert order(8, batch_size=8, seed=0) == [[7, 1, 6, 0, 5, 3, 2, 4]]
    assert order(8, batch_size=8, seed=0, epoch=1) == [[1, 4, 2, 5, 7, 0, 6, 3]]


def test_the_order_depends_on_nothing_drawn_before_and_draws_nothing():
    first = order()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert order() == first
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("start", range(6))
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_run_goes_on_at_any_step(start, shuffle):
    assert order(shuffle=shuffle, start=start) == order(shuffle=shuffle)[start:]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_ranks_together_read_the_same_batch(world_size, shuffle):
    ranks = [
        order(shuffle=shuffle, world_size=world_size, rank=rank, start=1)
        for rank in range(world_size)
    ]
    together = [[i for part in parts for i in part] for parts in zip(*ranks, strict=True)]
    assert together == order(shuffle=shuffle, start=1)
    assert {len(part) for rank in ranks for part in rank} == {12 // world_size}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"world_size": 5}, "batch_size: expected a multiple of the world size 5, got 12"),
        ({"world_size": 2, "rank": 2}, "rank: expected 0 to 1, got 2"),
        ({"rank": -1}, "rank: expected 0 to 0, got -1"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"world_size": 0}, "world_size: expected at least 1, got 0"),
        ({"epoch": -1}, "epoch: expected at least 0, got -1"),
        ({"start": -1}, "start: expected at least 0, got -1"),
    ],
)
def test_impossible_shares_are_refused_before_anything_is_read(fields, message):
    settings = {"batch_size": 12, "seed": 3, "epoch": 0, "shuffle": True, **fields}
    with pytest.raises(ConfigError) as caught:
        batch_indices(50, **settings)
    assert str(caught.value) == message
