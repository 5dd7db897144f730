import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from video_files import numbered_frame

from transformers_testa.data.augmentation import VideoAugmentation


SIZE = 32
seeds = st.integers(0, 2**31 - 1)


def moving_video(num_frames=4):
    return torch.stack(
        [torch.from_numpy(numbered_frame(number, 40, 56)).permute(2, 0, 1) for number in range(num_frames)]
    )


@given(seeds)
def test_a_still_video_stays_still(seed):
    frames = moving_video(1).repeat(5, 1, 1, 1)
    augmented = VideoAugmentation(SIZE)(frames, seed)
    assert augmented.shape == (5, 3, SIZE, SIZE) and augmented.dtype == torch.uint8
    assert (augmented == augmented[0]).all()


@given(seeds)
def test_every_frame_is_augmented_as_if_it_were_alone(seed):
    augmentation, frames = VideoAugmentation(SIZE), moving_video()
    alone = torch.cat([augmentation(frame[None], seed) for frame in frames])
    assert torch.equal(augmentation(frames, seed), alone)


@given(seeds, seeds)
def test_a_seed_decides_everything_and_the_global_generator_is_left_alone(seed, global_seed):
    torch.manual_seed(global_seed)
    state = torch.get_rng_state()
    first = VideoAugmentation(SIZE)(moving_video(), seed)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(VideoAugmentation(SIZE)(moving_video(), seed), first)


def test_seeds_differ():
    frames = moving_video(1)
    results = {VideoAugmentation(SIZE)(frames, seed).numpy().tobytes() for seed in range(20)}
    assert len(results) >= 18


@given(seeds)
def test_without_operations_a_video_is_cropped_and_flipped_and_no_more(seed):
    frames = moving_video(2)
    augmented = VideoAugmentation(SIZE, num_ops=0)(frames, seed)
    crops = [frames[..., y : y + SIZE, x : x + SIZE] for y in range(9) for x in range(25)]
    assert any(torch.equal(augmented, found) for crop in crops for found in (crop, crop.flip(-1)))


def test_half_of_the_videos_are_mirrored_if_flips_are_wanted():
    frames = moving_video(1)[..., :SIZE, :SIZE]
    for flip, least, most in ((True, 35, 65), (False, 0, 0)):
        augmentation = VideoAugmentation(SIZE, flip=flip, num_ops=0)
        assert least <= sum(torch.equal(augmentation(frames, seed), frames.flip(-1)) for seed in range(100)) <= most


def test_a_red_object_stays_red():
    red = torch.tensor([200, 60, 60], dtype=torch.uint8)[:, None, None].expand(1, 3, SIZE, SIZE)
    for seed in range(300):
        centre = VideoAugmentation(SIZE, magnitude=30)(red, seed)[0, :, SIZE // 2, SIZE // 2].int()
        # Grey where the object has left the picture, black where it is too dark for any colour.
        assert centre[0] > centre[1] == centre[2] or len(set(centre.tolist())) == 1


def test_frames_smaller_than_the_crop_are_an_error():
    with pytest.raises(ValueError, match="Frames of 40 x 56 pixels are smaller than the crop of 48 x 48"):
        VideoAugmentation(48)(moving_video(), 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size is 0"),
        ({"size": 8, "num_ops": -1}, "num_ops -1"),
        ({"size": 8, "magnitude": 31}, "magnitude is 31; 0 to 30"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        VideoAugmentation(**settings)
