"""The claims about several ranks that other files make, in one start of processes."""

import pytest
import test_align_meshes as aligned
import test_align_recipes as alignment
import test_caption as caption
import test_contrastive as contrastive
import test_curvature as curvature
import test_distributed_checkpoint as checkpoints
import test_image_text as image_text
import test_ranks_refuse as refusals
import test_sharding as sharding
import test_text_to_image as pictures
import torch
from ranks import DEVICE, check_claims


@pytest.mark.ranks
@pytest.mark.skipif(DEVICE != "cpu", reason="the claims below are for GPUs")
@pytest.mark.timeout(900)
def test_several_ranks_equal_one_process_and_go_on_for_one_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CHECKPOINT_TEST", str(tmp_path))
    monkeypatch.setenv("RECIPES_OUT", str(tmp_path))
    four = sharding.FOUR + checkpoints.FOUR + aligned.FOUR
    two = sharding.TWO + checkpoints.TWO + pictures.TWO + contrastive.TWO + curvature.TWO
    two += aligned.TWO
    # Those of recipes start and end their process group themselves.
    runs = [([run], 2) for run in caption.TWO + image_text.TWO + alignment.TWO + refusals.RUNS]
    check_claims((four, 4), (two + refusals.TWO, 2), *runs, (refusals.AFTER, 2))
    checkpoints.resumed_on_one()
    pictures.as_on_one_process(tmp_path)
    for recipe in (caption, image_text, alignment):
        recipe.equal_one_process(tmp_path)
    refusals.exported_by_one(capsys)


@pytest.mark.gpu
@pytest.mark.ranks
@pytest.mark.skipif(
    DEVICE != "cuda" or torch.cuda.device_count() < 2, reason="needs RANKS_DEVICE=cuda and two GPUs"
)
def test_two_gpus_equal_one():
    check_claims((sharding.GPUS + aligned.GPUS, 2))
