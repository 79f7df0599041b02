"""The drawings the embedded model learns from: deterministic, true to captions, tied to their noise."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")

from lcm_rt.embedded import MODEL_DIR, scenes  # noqa: E402

SIZE = 64


@pytest.fixture(autouse=True)
def _flush_denormal():
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


def some_z(count, seed=0):
    return torch.randn(count, 4, scenes.GRID, scenes.GRID, generator=torch.Generator().manual_seed(seed))


def say(**values):
    """One row of attribute indices from words."""
    said = [0] * len(scenes.NAMES)
    for name, value in values.items():
        said[scenes.COLUMN[name]] = scenes.ATTRIBUTES[name].index(value)
    return said


def paint(count=4, seed=0, **values):
    z = some_z(count, seed)
    drawn = scenes.resolve(torch.tensor([say(**values)] * count), z)
    return scenes.draw(drawn, z, size=SIZE)


def test_pictures_are_in_range_and_the_same_every_time():
    rng = random.Random(3)
    said = torch.tensor([scenes.speak(rng) for _ in range(16)])
    z = some_z(16)
    drawn = scenes.resolve(said, z)
    first, second = scenes.draw(drawn, z, size=SIZE), scenes.draw(drawn, z, size=SIZE)
    assert first.image.shape == (16, 3, SIZE, SIZE)
    assert first.focus.shape == (16, 1, 32, 32)
    assert first.image.isfinite().all()
    assert -1 <= first.image.min() <= first.image.max() <= 1
    assert torch.equal(first.image, second.image)


def test_sketches_follow_their_generator():
    z = some_z(4)
    drawn = scenes.resolve(torch.tensor([say(time="day", back="mountains")] * 4), z)
    one, same, other = (
        scenes.draw(drawn, z, size=SIZE, sketch=torch.Generator().manual_seed(seed)).image for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_night_is_darker_than_day():
    for land in ("meadow", "desert", "snow"):
        assert paint(time="night", land=land).image.mean() < paint(time="day", land=land).image.mean() - 0.4


def test_sunset_is_redder_than_snow():
    def redness(picture):
        return picture.image[:, 0].mean() - picture.image[:, 2].mean()

    assert redness(paint(time="sunset")) > redness(paint(land="snow", time="day")) + 0.2


@pytest.mark.parametrize("body", ["sun", "moon"])
def test_the_body_stands_where_its_position_says(body):
    z = some_z(8)
    time = "day" if body == "sun" else "night"
    drawn = scenes.resolve(torch.tensor([say(time=time, body=body)] * 8), z)
    place = torch.tensor([[0.2 + 0.08 * i, 0.2, 0.06] for i in range(8)])
    there = scenes.draw(drawn, z, size=SIZE, body=place)
    drawn[:, scenes.COLUMN["body"]] = 0
    without = scenes.draw(drawn, z, size=SIZE, body=place * torch.tensor([1, 1, 0]))
    for i in range(8):
        x, y, _ = (place[i] * SIZE).long()
        assert (there.image[i, :, y, x] - without.image[i, :, y, x]).abs().max() > 0.1
        assert there.focus[i, 0, int(place[i, 1] * 32), int(place[i, 0] * 32)] > 0.9


def test_captions_mention_only_what_is_said():
    rng = random.Random(5)
    for _ in range(300):
        said = scenes.speak(rng)
        text = scenes.caption(said, rng).lower()
        for name, value in zip(scenes.NAMES, said, strict=True):
            phrases = scenes.PHRASES[name]
            if value:
                assert any(p in text for p in phrases[scenes.ATTRIBUTES[name][value]])
        if not any(said):
            spoken = (p for values in scenes.PHRASES.values() for ps in values.values() for p in ps)
            assert not any(f" {p} " in f" {text} " for p in spoken)


def test_what_is_said_is_drawn():
    rng = random.Random(6)
    said = torch.tensor([scenes.speak(rng) for _ in range(500)])
    drawn = scenes.resolve(said, some_z(500))
    spoken = said > 0
    assert torch.equal(drawn[spoken], said[spoken])
    assert (drawn[:, scenes.COLUMN["time"]] > 0).all()
    assert (drawn[:, scenes.COLUMN["land"]] > 0).all()


def test_coupled_noise_is_gaussian_and_holds_the_layout():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(512, 4, 32, 32, generator=generator)
    z = some_z(512, seed=1)
    coupled = scenes.couple(noise, z)
    assert torch.allclose(scenes.project(coupled), z, atol=1e-4)
    assert abs(coupled.mean()) < 0.01
    assert abs(coupled.std() - 1) < 0.01
    # Neighbours inside a block must stay independent.
    assert abs((coupled[..., 0] * coupled[..., 1]).mean()) < 0.01
    assert torch.allclose(scenes.project(noise).std(), torch.tensor(1.0), atol=0.02)


def test_layout_decides_the_picture():
    """The same words with the same layout give the same drawing; another layout gives another."""
    assert torch.equal(paint(1, seed=1, time="dawn").image, paint(1, seed=1, time="dawn").image)
    assert not torch.equal(paint(1, seed=1, time="dawn").image, paint(1, seed=2, time="dawn").image)


def test_holes_are_plain_masks_of_many_sizes():
    focus = paint(4, time="day", body="sun").focus
    rng = random.Random(0)
    holes = torch.stack([scenes.hole(focus[i % 4], rng, size=SIZE) for i in range(200)])
    assert holes.shape == (200, 1, SIZE, SIZE)
    assert set(holes.unique().tolist()) == {0.0, 1.0}
    area = holes.mean((1, 2, 3))
    assert area.min() > 0
    assert (area < 0.2).any() and (area > 0.8).any() and (area == 1).any()
    assert torch.equal(holes[0], scenes.hole(focus[0], random.Random(0), size=SIZE))


def test_some_holes_are_about_the_small_things():
    focus = torch.zeros(1, 32, 32)
    focus[:, 20:24, 5:9] = 1
    rng = random.Random(1)
    holes = torch.stack([scenes.hole(focus, rng, size=SIZE) for _ in range(200)])
    inside = holes[..., 40:48, 10:18].mean((1, 2, 3))
    just = (inside == 1) & (holes.mean((1, 2, 3)) < 0.25)
    assert just.sum() > 25, "the thing and some air around it"


def ink(pixels):
    return scenes.restyle(np.asarray(pixels, np.uint8), "ink").astype(int)


def test_ink_draws_a_dark_line_where_the_colour_changes():
    pixels = np.full((SIZE, SIZE, 3), 255)
    pixels[SIZE // 2 :] = 170
    drawn = ink(pixels).mean(-1)
    assert drawn[SIZE // 2, 0] < 90 < drawn[-1, 0] < drawn[0, 0] - 30, "line, grey wash, paper"
    assert np.ptp(drawn, axis=1).max() == 0
    paper = ink(np.full((SIZE, SIZE, 3), 255))
    assert np.ptp(paper, axis=(0, 1)).max() == 0
    assert paper[0, 0, 0] > paper[0, 0, 2] > 200, "cream"


def test_ink_is_white_on_a_dark_night():
    pixels = np.full((SIZE, SIZE, 3), (10, 14, 40))
    pixels[: SIZE // 8] = (150, 150, 170)
    drawn = ink(pixels).mean(-1)
    assert drawn[SIZE // 8, 0] > 160 > 100 > drawn[-1, 0]


def test_restyle_takes_batches_and_leaves_them_alone():
    pixels = ((paint(3, time="sunset").image.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
    before = pixels.copy()
    drawn = scenes.restyle(pixels, "ink")
    assert (drawn.shape, drawn.dtype) == (pixels.shape, np.uint8)
    assert np.array_equal(pixels, before)
    assert np.array_equal(drawn[1], scenes.restyle(pixels[1], "ink"))
    with pytest.raises(KeyError):
        scenes.restyle(pixels, "oil")


@pytest.mark.skipif(not (MODEL_DIR / "tokenizer").exists(), reason="no trained model in this checkout")
@pytest.mark.parametrize("text", ["", "night over a lake", "Ünïcödé 猫 🙂 \x00", "zyzzyva " * 100])
def test_tokenizer_encodes_any_text(text):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(MODEL_DIR / "tokenizer")
    assert tokenizer.model_max_length == 77
    ids = tokenizer(text, padding="max_length", truncation=True, max_length=77).input_ids
    assert len(ids) == 77
    assert ids[0] == tokenizer.bos_token_id
    end = ids.index(tokenizer.eos_token_id)
    assert set(ids[end:]) == {tokenizer.eos_token_id}  # no unknown token cuts the text short
    assert end > 1 or not text


def test_the_package_says_where_its_model_is_without_torch():
    code = "import sys, lcm_rt.embedded as e; assert 'torch' not in sys.modules; assert e.MODEL_DIR"
    subprocess.run([sys.executable, "-c", code], check=True)
