import pytest
import torch

from offramp.models.kv_cache import KVCache


@pytest.fixture
def cache():
    return KVCache(num_layers=2, batch_size=3, num_heads=2, head_dim=4, capacity=5)


def keys(batch, length, value):
    return torch.full((batch, 2, length, 4), float(value))


def test_what_is_written_is_read(cache):
    k = torch.randn(3, 2, 4, 4)
    cache.write(1, k, -k, positions=torch.arange(4)[None])
    read_k, read_v = cache.read(1, end=4)
    assert torch.equal(read_k, k)
    assert torch.equal(read_v, -k)
    assert cache.lengths.tolist() == [[0, 0, 0], [4, 4, 4]]
    assert not cache.keys[0].any()


def test_rows_stand_where_their_positions_say(cache):
    positions = torch.tensor([[0, 1], [3, 4]])
    k = keys(2, 2, 7)
    cache.write(0, k, k, positions=positions, rows=torch.tensor([2, 0]))
    written = cache.keys[0, :, 0, :5, 0] == 7
    assert written.nonzero().tolist() == [[0, 3], [0, 4], [2, 0], [2, 1]]
    assert cache.lengths[0].tolist() == [5, 0, 2]
    chosen, _ = cache.read(0, end=2, rows=torch.tensor([2]))
    assert torch.equal(chosen, keys(1, 2, 7))


def test_padding_is_never_read(cache):
    real = torch.tensor([[True, True], [False, True], [False, False]])
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    k = keys(3, 2, 9)
    k[~real[:, None, :].expand(3, 2, 2)] = float("nan")
    cache.write(0, k, k, positions=positions, real=real)
    read, _ = cache.read(0, end=5)
    assert not read.isnan().any()
    assert cache.lengths[0].tolist() == [2, 1, 0]


def test_a_length_never_shrinks_when_earlier_positions_are_filled(cache):
    cache.write(0, keys(3, 1, 1), keys(3, 1, 1), positions=torch.tensor([[4]]))
    cache.write(0, keys(3, 1, 1), keys(3, 1, 1), positions=torch.tensor([[0]]))
    assert cache.lengths[0].tolist() == [5, 5, 5]


def test_a_crop_shortens_what_is_longer(cache):
    cache.lengths[:] = torch.tensor([[5, 2, 0], [3, 3, 1]])
    cache.crop(2)
    assert cache.lengths.tolist() == [[2, 2, 0], [2, 2, 1]]


def test_a_crop_of_one_row_leaves_the_others(cache):
    cache.lengths[:] = torch.tensor([[5, 2, 4], [3, 3, 1]])
    cache.crop(2, row=0)
    assert cache.lengths.tolist() == [[2, 2, 4], [2, 3, 1]]


def test_a_row_that_is_cleared_is_new_and_the_others_stay(cache):
    cache.keys.fill_(float("nan"))
    cache.values.fill_(1)
    cache.lengths.fill_(5)
    cache.clear(1)
    assert not cache.keys[:, 1].any()
    assert not cache.values[:, 1].any()
    assert cache.lengths.tolist() == [[5, 0, 5]] * 2
    assert cache.keys[:, [0, 2]].isnan().all()
    assert cache.values[:, [0, 2]].all()


def test_its_bytes_are_those_of_keys_and_values():
    cache = KVCache(
        num_layers=2,
        batch_size=3,
        num_heads=2,
        head_dim=4,
        value_dim=2,
        capacity=5,
        dtype=torch.bfloat16,
    )
    assert cache.bytes == 2 * 3 * 2 * (5 + 1) * (4 + 2) * 2


@pytest.mark.parametrize("row", [-1, 3])
def test_a_row_that_it_does_not_have_is_refused(cache, row):
    for change in (cache.clear, lambda row: cache.crop(1, row=row)):
        with pytest.raises(ValueError, match=f"^rows: the cache holds 3 rows, got row {row}$"):
            change(row)


def test_the_capacity_is_a_limit(cache):
    cache.require(5)
    with pytest.raises(ValueError, match="the cache holds 5 positions, got 6"):
        cache.require(6)
