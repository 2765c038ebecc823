"""The claims about several ranks that other files make, in one start of processes."""

import pytest
import test_distributed_checkpoint as checkpoints
import test_ranks_refuse as refusals
import test_sharding as sharding
from ranks import check_claims


@pytest.mark.ranks
@pytest.mark.timeout(900)
def test_several_ranks_equal_one_process_and_go_on_for_one_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CHECKPOINT_TEST", str(tmp_path))
    two = sharding.TWO + checkpoints.TWO + refusals.TWO
    check_claims((sharding.FOUR + checkpoints.FOUR, 4), (two, 2))
    checkpoints.resumed_on_one()
    refusals.exported_by_one(capsys)
