"""Queue and memory bank on one rank (several: tests/distributed/test_methods_over_ranks.py)."""

from __future__ import annotations

import pytest
import torch

from dist_scan.models.memory_bank import MemoryBank, Queue, check_queue


def test_queue_replaces_the_oldest_keys() -> None:
    queue = Queue(8, 2, seed=0)
    random = queue.rows.clone()
    queue.enqueue(torch.ones(4, 2))
    assert (queue.rows[:4] == 1).all()
    assert torch.equal(queue.rows[4:], random[4:])
    queue.enqueue(torch.ones(4, 2) * 2)
    queue.enqueue(torch.ones(4, 2) * 3)
    assert (queue.rows[:4] == 3).all()
    assert (queue.rows[4:] == 2).all()
    assert queue.pointer == 4


def test_queue_holds_whole_steps_only() -> None:
    with pytest.raises(ValueError, match="queue_size: 10 .* 8 or 12"):
        check_queue(10, 4)


def test_bank_reads_what_was_written_and_the_last_of_equal_indices_wins() -> None:
    bank = MemoryBank(11, (2,), num_shards=3, fill=-1)
    bank.write(torch.tensor([10, 0, 5, 5]), torch.arange(8.0).view(4, 2))
    assert bank.read(torch.tensor([5, 1, 10, 0, 5])).tolist() == [
        [6, 7],
        [-1, -1],
        [0, 1],
        [2, 3],
        [6, 7],
    ]
    with pytest.raises(ValueError, match="allowed: 0..10"):
        bank.read(torch.tensor([11]))


def test_bank_loads_its_state_and_needs_all_shards() -> None:
    bank, other = (MemoryBank(11, (2,), num_shards=3) for _ in range(2))
    bank.fill(torch.arange(22.0).view(11, 2))
    other.load([bank.state()])
    assert torch.equal(other.whole(), bank.whole())
    with pytest.raises(ValueError, match="lacks shards"):
        other.load([])


def test_fill_and_whole_are_inverse() -> None:
    bank = MemoryBank(10, (2,), torch.int32, num_shards=3)
    bank.fill(torch.arange(20).view(10, 2))
    bank.fill(torch.full((10,), 9), column=1)
    assert bank.whole().tolist() == [[2 * i, 9] for i in range(10)]
    assert bank.whole().dtype == torch.int32


def test_one_column_of_some_rows_can_be_written() -> None:
    bank = MemoryBank(10, (3,), torch.int32, num_shards=3, fill=-1)
    bank.write(torch.tensor([9, 0, 4]), torch.tensor([7, 8, 6]), column=1)
    rows = bank.whole()
    assert rows[:, 1].tolist() == [8, -1, -1, -1, 6, -1, -1, -1, -1, 7]
    assert (rows[:, [0, 2]] == -1).all()
