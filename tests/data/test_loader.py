"""Packing: rows, cuts, targets and weights, on samples small enough to check by hand."""

import numpy as np
import pytest
import torch

from fastllava.batch import IMAGE_ID, ImageSpec
from fastllava.data.loader import Sample, pack

SPEC = ImageSpec(size=4, patches=3, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def sample(ids, supervised, weight=1.0, n_images=None):
    ids = np.array(ids, np.int32)
    n_images = int((ids == IMAGE_ID).sum()) if n_images is None else n_images
    images = [np.full((3, 4, 4), 7, np.uint8)] * n_images
    return Sample(ids, np.array(supervised, np.int32).reshape(-1, 2), images, weight)


def test_two_samples_by_hand():
    batch = pack([sample([1, IMAGE_ID, 5, 6], [[2, 4]], 0.5), sample([1, 8, 9], [[1, 3]], 0.25)], SPEC, 100)
    assert batch.token_ids.tolist() == [1, 0, 0, 0, 5, 6, 1, 8, 9]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 6, 9]
    assert batch.max_seqlen == 6
    assert batch.patch_rows.tolist() == [1, 2, 3]
    assert batch.text_rows.tolist() == [0, 4, 5, 6, 7, 8]
    assert batch.supervised_rows.tolist() == [3, 4, 6, 7]
    assert batch.targets.tolist() == [5, 6, 8, 9]
    assert batch.weights.tolist() == [0.5, 0.5, 0.25, 0.25]
    assert batch.pixels.shape == (1, 3, 4, 4)
    assert batch.pixels.dtype == torch.uint8


def test_the_cut_takes_patches_text_and_targets_beyond_it():
    batch = pack([sample([1, 5, IMAGE_ID, 6, 7], [[3, 5]]), sample([1, 9], [[1, 2]])], SPEC, 4)
    # Rows 0..3 of the first sample: two tokens and two of three patches; the third patch has no row: T = 6.
    assert batch.cu_seqlens.tolist() == [0, 4, 6]
    assert batch.patch_rows.tolist() == [2, 3, 6]
    assert batch.text_rows.tolist() == [0, 1, 4, 5]
    assert batch.targets.tolist() == [9]
    assert batch.supervised_rows.tolist() == [4]


def test_first_token_is_never_a_target():
    batch = pack([sample([4, 5], [[0, 2]])], SPEC, 100)
    assert batch.targets.tolist() == [5]


def test_no_images_and_nothing_supervised_keep_their_shapes():
    batch = pack([sample([1, 2], [])], SPEC, 100)
    assert batch.pixels.shape == (0, 3, 4, 4)
    assert batch.patch_rows.shape == (0,)
    assert batch.targets.shape == (0,)
    assert batch.weights.shape == (0,)
    assert [t.dtype for t in (batch.patch_rows, batch.targets, batch.weights)] == [torch.int32, torch.int64, torch.float32]


def test_an_image_too_few_is_refused():
    with pytest.raises(ValueError, match="0 images for 1 image markers"):
        pack([sample([1, IMAGE_ID, 2], [[2, 3]], n_images=0)], SPEC, 100)
