import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from exact import moved, normal
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.unireplknet_inputs import (
    VIEWS,
    AudioImage,
    Forecaster,
    PointClassifier,
    PointImage,
    SeriesImage,
    VideoImage,
    audio_loss,
    pixels_of,
    point_loss,
    rotation,
    series_loss,
    squarest,
    video_loss,
)


def net(**options):
    torch.manual_seed(0)
    return create_model("unireplknet_nano", **{"num_classes": 2, "dim": 8, "depths": (1, 1, 1, 1), **options})


def learns(model, x, targets, loss_of, steps=12):
    """Train on the same examples and return the first and the last loss."""
    optimiser = torch.optim.AdamW(model.train().parameters(), lr=5e-3)
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = loss_of(model(x), targets)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


# ---- sound


def slow_spectrogram(wave, rate, bins):
    """Compute log-mel energies (frames, bins) of one wave as Kaldi's documentation has them."""
    length, step = rate // 40, rate // 100
    points = 2 ** math.ceil(math.log2(length))
    wave = wave.double() - wave.double().mean()

    def mel(frequency):
        return 1127 * math.log(1 + frequency / 700)

    low, high = mel(20), mel(rate / 2)
    corners = [low + (high - low) * i / (bins + 1) for i in range(bins + 2)]
    rows = []
    for start in range(0, len(wave) - length + 1, step):
        piece = wave[start : start + length] - wave[start : start + length].mean()
        sharp = [piece[0] * (1 - 0.97)] + [piece[i] - 0.97 * piece[i - 1] for i in range(1, length)]
        seen = [value * (0.5 - 0.5 * math.cos(2 * math.pi * i / (length - 1))) for i, value in enumerate(sharp)]
        energies = [0.0] * bins
        for k in range(points // 2):
            real = sum(v * math.cos(2 * math.pi * k * i / points) for i, v in enumerate(seen))
            imaginary = sum(v * math.sin(2 * math.pi * k * i / points) for i, v in enumerate(seen))
            place = mel(k * rate / points)
            for b in range(bins):
                left, middle, right = corners[b : b + 3]
                weight = min((place - left) / (middle - left), (right - place) / (right - middle))
                energies[b] += max(0.0, weight) * float(real**2 + imaginary**2)
        rows.append([math.log(max(energy, 1.1920929e-07)) for energy in energies])
    return torch.tensor(rows, dtype=torch.float32)


def test_a_spectrogram_is_the_slow_loop():
    rate, bins = 1200, 5
    wave = 0.3 * normal(1, 62)[0].float() + 0.1
    embed = AudioImage(rate, bins, 4, mean=0.5, std=2.0).eval()
    expected = F.pad(slow_spectrogram(wave, rate, bins), (0, 0, 0, 1))
    assert expected.shape == (4, bins)
    image = embed(wave[None])
    torch.testing.assert_close(image, (expected.T[None, None] - 0.5) / 4, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(AudioImage(rate, bins, 2, 0.5, 2.0).eval()(wave[None]), image[..., :2])
    assert AudioImage().eval()(torch.randn(2, 16_000)).shape == (2, 1, 128, 128)


def test_bands_are_silenced_in_training_alone():
    torch.manual_seed(0)
    embed = AudioImage(1200, 16, 30, mean=0.0, std=0.5, frequency_mask=6, time_mask=9)
    waves = torch.randn(64, 30 * 12 + 18)
    plain = embed.eval()(waves)
    masked = embed.train()(waves)
    changed = (plain != masked)[:, 0]
    assert torch.equal(masked[:, 0][changed], torch.zeros(int(changed.sum())))
    rows, columns = changed.all(2).sum(1), changed.all(1).sum(1)
    assert 0 < rows.max() < 6 and 0 < columns.max() < 9
    assert torch.equal(changed, changed.all(2)[:, :, None] | changed.all(1)[:, None])


def test_tones_are_told_apart():
    torch.manual_seed(0)
    time = torch.arange(3200) / 16_000
    labels = torch.arange(8) % 2
    waves = torch.sin(2 * math.pi * (300 + 900 * labels[:, None]) * time + torch.rand(8, 1) * 6)
    model = nn.Sequential(AudioImage(bins=24, frames=18), net(in_chans=1))
    first, last = learns(model, waves, F.one_hot(labels, 2).float(), audio_loss)
    assert last < 0.6 * first


# ---- video


@pytest.mark.parametrize(("frames", "grid"), [(1, (1, 1)), (6, (2, 3)), (7, (1, 7)), (16, (4, 4))])
def test_frames_are_laid_out_in_reading_order(frames, grid):
    clips = normal(2, 3, frames, 4, 5)
    image = VideoImage()(clips)
    assert squarest(frames) == grid
    assert image.shape == (2, 3, grid[0] * 4, grid[1] * 5)
    for t in range(frames):
        row, column = t // grid[1], t % grid[1]
        part = image[:, :, 4 * row : 4 * row + 4, 5 * column : 5 * column + 5]
        assert torch.equal(part, clips[:, :, t])
    assert torch.equal(VideoImage(woven=True)(clips), clips.reshape(image.shape))


def test_motions_are_told_apart():
    labels = torch.arange(8) % 2
    clips = torch.zeros(8, 3, 4, 12, 12)
    for i, label in enumerate(labels.tolist()):
        for t in range(4):
            column = 3 * t if label else 9 - 3 * t
            clips[i, :, t, i : i + 3, column : column + 3] = 1
    first, last = learns(nn.Sequential(VideoImage(), net()), clips, labels, video_loss)
    assert last < 0.7 * first


def test_video_loss_takes_numbers_and_mixtures():
    logits, mixed = normal(2, 4), torch.tensor([[0.3, 0.7, 0, 0], [0, 0, 0, 1.0]], dtype=torch.float64)
    logs = logits.log_softmax(1)
    torch.testing.assert_close(video_loss(logits, mixed), -(logs * mixed).sum(1).mean())
    right = torch.tensor([1, 3])
    smooth = 0.9 * F.one_hot(right, 4) + 0.1 / 4
    torch.testing.assert_close(video_loss(logits, right), -(logs * smooth).sum(1).mean())


# ---- point clouds


def test_rotations_turn_about_z_then_y_then_x():
    angles = normal(3, 3)
    for (a, b, c), found in zip(angles.tolist(), rotation(angles)):
        x, y, z = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 2, 3], [0.0, 1, 0], [2.0, 0, -1]))
        for v in (x, y, z):
            p, q, r = v.tolist()
            p, q = math.cos(c) * p - math.sin(c) * q, math.sin(c) * p + math.cos(c) * q
            p, r = math.cos(b) * p + math.sin(b) * r, -math.sin(b) * p + math.cos(b) * r
            q, r = math.cos(a) * q - math.sin(a) * r, math.sin(a) * q + math.cos(a) * r
            torch.testing.assert_close(found @ v, torch.tensor([p, q, r], dtype=torch.float64))
    assert len(set(VIEWS)) == 10


@pytest.mark.parametrize("side", [8, 11, 20])
def test_points_fall_on_a_centred_square(side):
    points = normal(3, 40, 3) * torch.tensor([1.0, 0.4, 5.0])
    found = pixels_of(points, side)
    for cloud, places in zip(points, found):
        low, step = cloud[:, :2].amin(0), float((cloud[:, :2].amax(0) - cloud[:, :2].amin(0)).max()) / (side - 3)
        rough = [
            [min(math.floor((p[i] - low[i]) / step + 1e-12), side - 3) + 1 for i in (0, 1)] for p in cloud.tolist()
        ]
        rough = torch.tensor(rough)
        middle = (rough.amax(0) + rough.amin(0)) // 2
        assert torch.equal(places, rough + (side - 1) // 2 - middle)
    assert found.min() >= 1 and found.max() <= side - 2
    assert torch.equal(pixels_of(torch.zeros(1, 4, 3), side), torch.full((1, 4, 2), (side - 1) // 2))


def test_features_and_drawing_are_the_slow_loop():
    torch.manual_seed(0)
    embed = moved(PointImage(side=9, views=2, neighbours=3, dim=8)).eval()
    points = normal(2, 6, 3)
    found = embed.features(points)
    edges = torch.zeros(2, 6, 3, 8, dtype=torch.float64)
    for b in range(2):
        lifted = points[b] @ embed.lift.weight.T + embed.lift.bias
        for p in range(6):
            near = sorted(range(6), key=lambda q: float((points[b, q] - points[b, p]).square().sum()))[:3]
            for k, q in enumerate(near):
                edges[b, p, k] = torch.cat((lifted[q] - lifted[p], lifted[p])) @ embed.edge.weight.T
    for b in range(2):
        for group in range(4):
            part = edges[b, :, :, 2 * group : 2 * group + 2]
            edges[b, :, :, 2 * group : 2 * group + 2] = (part - part.mean()) / (part.var(unbiased=False) + 1e-5).sqrt()
    edges = edges * embed.edge_norm.weight + embed.edge_norm.bias
    edges = torch.where(edges > 0, edges, 0.2 * edges).amax(2)
    torch.testing.assert_close(found, edges @ embed.proj.weight.T + embed.proj.bias)
    place = torch.randint(1, 8, (4, 6, 2))
    drawn, expected = embed._drawn(place, found), torch.zeros(4, 8, 9, 9, dtype=torch.float64)
    for view in range(4):
        for p in range(6):
            for i in (-1, 0, 1):
                for j in (-1, 0, 1):
                    expected[view, :, place[view, p, 0] + i, place[view, p, 1] + j] += found[view // 2, p]
    torch.testing.assert_close(drawn, expected)


def test_views_exchange_what_they_see():
    torch.manual_seed(0)
    fusion = moved(PointImage(side=15, views=2, neighbours=1, dim=4).fusion)
    x = normal(4, 4, 15, 15)
    patches = F.conv2d(x, fusion.patches.weight, stride=7)
    tokens = torch.stack([torch.cat([patches[2 * b + v].flatten(1).T for v in (0, 1)]) for b in (0, 1)])
    query, key, value = fusion.qkv(fusion.norm1(tokens)).chunk(3, -1)
    heads = []
    for h in range(8):
        part = slice(128 * h, 128 * h + 128)
        heads.append((query[..., part] @ key[..., part].transpose(1, 2) / 128**0.5).softmax(-1) @ value[..., part])
    tokens = tokens + fusion.proj(torch.cat(heads, -1))
    tokens = tokens + fusion.mlp(tokens)
    maps = torch.stack([tokens[b, 4 * v : 4 * v + 4].T.reshape(128, 2, 2) for b in (0, 1) for v in (0, 1)])
    expected = fusion.mix(torch.cat((fusion.back(F.interpolate(maps, size=15)), x), 1))
    torch.testing.assert_close(fusion(x, 2), expected)


def test_a_cloud_is_seen_from_each_side_in_the_colours_of_imagenet():
    eighths = [(0, 0), (2, 0), (4, 0), (6, 0), (5, -1), (5, 1), (7, -1), (7, 1), (0, -2), (0, 2)]
    published = [(x * math.pi / 4, y * math.pi / 4, math.pi / 2) for x, y in eighths]
    assert [angle for view in VIEWS for angle in view] == pytest.approx([angle for view in published for angle in view])
    torch.manual_seed(0)
    embed = moved(PointImage(side=9, views=3, neighbours=2, dim=4)).eval()
    points = normal(2, 5, 3)
    turns = rotation(torch.tensor(published[:3], dtype=torch.float64))
    seen = torch.stack([torch.stack([turn @ point for point in cloud]) for cloud in points for turn in turns])
    drawn = embed._drawn(pixels_of(seen, 9), embed.features(points))
    image = embed.colour(embed.fusion(embed.image_block(drawn), 3)).sigmoid()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    given = []
    embed.image_block.register_forward_pre_hook(lambda module, args: given.extend(args))
    torch.testing.assert_close(embed(points), (image - mean) / std, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(given[0], drawn)


def test_clouds_are_told_apart():
    torch.manual_seed(0)
    labels = torch.arange(8) % 2
    points = torch.randn(8, 40, 3)
    points = torch.where(labels[:, None, None] == 0, F.normalize(points, dim=-1), points.clamp(-1, 1))
    model = PointClassifier(PointImage(side=16, views=2, neighbours=4, dim=8), net(num_classes=0), 2)
    images = model.embed(points)
    assert images.shape == (16, 3, 16, 16)
    features = model.net.forward_features(images).mean((2, 3)).view(8, -1)
    torch.testing.assert_close(model(points), model.head(model.norm(features)), rtol=1e-4, atol=1e-4)
    first, last = learns(model, points, labels, point_loss)
    assert last < 0.95 * first
    assert all(p.grad is not None for p in model.embed.parameters())


def test_point_loss_gives_a_fifth_to_the_other_classes():
    logits = normal(3, 5)
    right = torch.tensor([0, 4, 2])
    share = torch.where(F.one_hot(right, 5) > 0, 0.8, 0.2 / 4)
    torch.testing.assert_close(point_loss(logits, right), -(share * logits.log_softmax(1)).sum(1).mean())


# ---- time series


def test_series_become_images_node_by_node():
    torch.manual_seed(0)
    places = normal(3, 2)
    embed = moved(SeriesImage(2, nodes=3, dim=8, date_features=4, places=places)).eval()
    series, dates = normal(2, 6, 6), normal(2, 6, 4, seed=1)
    images = embed(series, dates)
    assert images.shape == (6, 1, 6, 8)
    for b in range(2):
        for node in range(3):
            own = series[b, :, 2 * node : 2 * node + 2]
            for t in range(6):
                value = sum(embed.value.weight[:, :, k] @ own[(t + k - 1) % 6] for k in range(3))
                value = value + embed.date.weight @ dates[b, t] + embed.place(places[node])
                found = images[3 * b + node, 0].flatten()[8 * t : 8 * t + 8]
                torch.testing.assert_close(found, value)
    assert float(SeriesImage(4, dim=512).value.weight.detach().std()) == pytest.approx(
        (2 / (1 + 1e-4) / 12) ** 0.5, rel=0.1
    )


def test_a_forecast_is_of_normalised_windows_put_back():
    torch.manual_seed(0)
    embed = SeriesImage(2, nodes=2, dim=8, date_features=0)
    model = Forecaster(embed, net(in_chans=1, num_classes=0), length=6, horizon=3).eval()
    series = 5 + 3 * torch.randn(2, 6, 4)
    torch.testing.assert_close(model(series), series.mean(1, keepdim=True).expand(-1, 3, -1))
    nn.init.normal_(model.head.weight, std=0.1)
    nn.init.normal_(model.head.bias)
    torch.testing.assert_close(model(7 * series - 2), 7 * model(series) - 2, rtol=1e-3, atol=1e-2)
    with torch.no_grad():
        model.scale.copy_(torch.tensor([2.0, 0.5]))
        model.shift.copy_(torch.tensor([0.3, -0.2]))
    forecast = model(series)
    for b in range(2):
        for node in range(2):
            own = series[b, :, 2 * node : 2 * node + 2]
            mean, deviation = own.mean(0), (own.var(0, unbiased=False) + 1e-5).sqrt()
            image = embed.value(((own - mean) / deviation * model.scale + model.shift).T[None]).transpose(1, 2)
            found = model.head(model.net.forward_features(image.reshape(1, 1, 6, 8)).flatten(1)).view(3, 2)
            expected = (found - model.shift) / model.scale * deviation + mean
            torch.testing.assert_close(forecast[b, :, 2 * node : 2 * node + 2], expected, rtol=1e-4, atol=1e-4)


def test_seasons_are_forecast():
    torch.manual_seed(0)
    time, phase = torch.arange(18.0), 6 * torch.rand(32, 1)
    series = torch.sin(2 * math.pi * time / 6 + phase)[..., None]
    model = Forecaster(SeriesImage(1, dim=12, date_features=0), net(in_chans=1, num_classes=0), 12, 6)
    first, last = learns(model, series[:, :12], series[:, 12:], series_loss)
    assert last < 0.4 * first


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: AudioImage()(torch.zeros(400)), r"\(400,\) is not allowed: give waves \(B, samples\)"),
        (lambda: AudioImage()(torch.zeros(1, 399)), "399 samples are too few: give 400"),
        (lambda: VideoImage()(torch.zeros(1, 3, 8, 8)), r"give clips \(B, C, frames, h, w\)"),
        (lambda: PointImage(side=7), "side = 7.*side of 8 or more, 1 to 10 views"),
        (lambda: PointImage(views=11), "views = 11"),
        (lambda: PointImage(side=8)(torch.zeros(1, 40, 2)), r"give points \(B, P, 3\)"),
        (lambda: PointImage(side=8)(torch.zeros(1, 31, 3)), "31 points are too few: give 32"),
        (lambda: SeriesImage(2, 3)(torch.zeros(1, 4, 5)), r"give series \(B, L, 3 x 2\)"),
        (lambda: SeriesImage(2)(torch.zeros(1, 4, 2)), "dates and date_features go together"),
        (
            lambda: Forecaster(SeriesImage(1, dim=4), net(in_chans=1), 6, 2)(torch.zeros(1, 5, 1)),
            "5 moments is not allowed: give 6",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_explained(use, message):
    with pytest.raises(InputError, match=message):
        use()
