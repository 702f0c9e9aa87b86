import math

import pytest
import torch
from torch import nn

from exact import moved, normal
from vitrail.app.build import count_parameters
from vitrail.checks.ctm import NET, Size, lstm_like, recursion_gap
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.ctm import (
    CTM,
    Attention,
    Backbone,
    Bits,
    Neurons,
    ParityCTM,
    SortingCTM,
    Synapses,
    Synchronisation,
    Thought,
    checkpoint_filter_fn,
    draw_pairs,
    sorted_places,
)

TINY = {"ticks": 5, "dim": 20, "input_dim": 8, "num_heads": 2, "synch_out": 6, "synch_action": 5}
TINY |= {"memory": 3, "memory_dim": 4, "temperature": 0.3}
IMAGES = {"depths": (1, 1), "bottleneck": False, "width": 8, "num_classes": 4}


def tiny(**options):
    torch.manual_seed(0)
    return CTM(**{**IMAGES, **TINY, **options})


def wrap(values):
    return values / values.abs().amax()


# ---- synchrony


def direct(active, pairs, decay):
    """Return the synchrony of the last tick, a sum over all ticks at once, (S, B)."""
    found = torch.zeros(pairs.shape[1], active.shape[2], dtype=torch.float64)
    for s, (i, j) in enumerate(pairs.T.tolist()):
        above = below = 0
        for k in range(len(active)):
            weight = torch.exp(-decay[s] * (len(active) - 1 - k))
            above, below = above + weight * active[k, i] * active[k, j], below + weight
        found[s] = above / below.sqrt()
    return found


@pytest.mark.parametrize(("ticks", "batch"), [(1, 2), (4, 1), (9, 3)])
def test_the_recursion_is_the_direct_sum(ticks, batch):
    module = Synchronisation(torch.tensor([[0, 3, 2, 2], [1, 3, 0, 4]])).double()
    with torch.no_grad():
        module.decay.copy_(torch.tensor([0.0, 0.4, 2.0, 15.0]))
    active = normal(ticks, 5, batch).requires_grad_()
    found = module(active)
    slow = torch.stack([direct(active[: t + 1], module.pairs, module.decay) for t in range(ticks)])
    torch.testing.assert_close(found, slow)
    weights = normal(*found.shape, seed=1)
    inputs = (active, module.decay) if ticks > 1 else (active,)
    ours, theirs = (torch.autograd.grad((value * weights).sum(), inputs) for value in (found, slow))
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other)


def test_decays_beyond_their_bounds_count_as_the_bound_and_learn():
    module = Synchronisation(torch.tensor([[0, 1, 1], [1, 1, 0]])).double()
    within = Synchronisation(module.pairs).double()
    assert not module.decay.any()
    with torch.no_grad():
        module.decay.copy_(torch.tensor([-2.0, 40.0, 1.0]))
        within.decay.copy_(torch.tensor([0.0, 15.0, 1.0]))
    active = normal(4, 2, 3)
    torch.testing.assert_close(module(active), within(active))
    slopes = [torch.autograd.grad(each(active).sum(), each.decay)[0] for each in (module, within)]
    torch.testing.assert_close(*slopes)
    assert slopes[0][0] != 0


def test_pairs_are_drawn_as_published():
    first, last = (draw_pairs("first-last", 9, 4, last=last) for last in (False, True))
    each = [(i, j) for i in range(4) for j in range(i, 4)]
    assert list(zip(*first.tolist())) == each
    assert list(zip(*last.tolist())) == [(i + 5, j + 5) for i, j in each]
    torch.manual_seed(0)
    dense = draw_pairs("random", 1000, 4)
    rows, columns = torch.triu_indices(4, 4)
    left, right = dense[0, [0, 4, 7, 9]], dense[1, :4]
    assert torch.equal(dense, torch.stack((left[rows], right[columns])))
    assert len({*left.tolist(), *right.tolist()}) > 6  # the sides differ, unlike first-last's
    drawn = draw_pairs("random-pairing", 1000, 50, self_pairs=7)
    assert drawn.shape == (2, 50)
    same = drawn[0] == drawn[1]
    assert same[:7].all()
    assert same.sum() < 10
    assert draw_pairs("random-pairing", 3, 40).unique().tolist() == [0, 1, 2]


# ---- synapses, neurons, attention


@pytest.mark.parametrize(("neurons", "depth"), [(20, 2), (31, 4)])
def test_synapses_are_a_u_net(neurons, depth):
    module = moved(Synapses(7, neurons, depth, 0.0))
    x = normal(3, 7)

    def through(block, y):
        return torch.nn.functional.silu(block[2](block[1](y)))

    widths = [int(neurons + (16 - neurons) * level / (depth - 1)) for level in range(depth)]
    assert [block[1].out_features for block in module.down] == widths[1:]
    levels = [through(module.first, x)]
    for block in module.down:
        levels.append(through(block, levels[-1]))
    y = levels[-1]
    for level in reversed(range(depth - 1)):
        y = module.norms[level](through(module.up[level], y) + levels[level])
    torch.testing.assert_close(module(x), y)
    assert [block[0].p for block in Synapses(7, 20, 3, 0.4).down] == [0.4, 0.4]


@pytest.mark.parametrize("hidden", [0, 3])
def test_each_neuron_has_a_net_of_its_own(hidden):
    torch.manual_seed(0)
    module = moved(Neurons(5, 4, hidden, 0.0, 0.5))
    history = normal(5, 2, 4).requires_grad_()
    found = module(history, module.matrices())
    slow = torch.zeros(5, 2, dtype=torch.float64)
    for d in range(5):
        for b in range(2):
            x = history[d, b]
            for layer in module.layers:
                y = (x @ layer.weight[d] + layer.bias[d, 0]) / layer.temperature
                half = len(y) // 2
                x = y[:half] * torch.sigmoid(y[half:])
            slow[d, b] = x[0]
    torch.testing.assert_close(found, slow)
    inputs = (history, *module.parameters())
    for one, other in zip(*(torch.autograd.grad(wrap(value).sum(), inputs) for value in (found, slow))):
        torch.testing.assert_close(one, other)


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = moved(Attention(8, 2, 0.0)), nn.MultiheadAttention(8, 2, batch_first=True).double()
    names = {"in_proj_weight": "qkv.weight", "in_proj_bias": "qkv.bias"}
    names |= {f"out_proj.{kind}": f"proj.{kind}" for kind in ("weight", "bias")}
    theirs.load_state_dict({name: ours.state_dict()[own] for name, own in names.items()})
    query, tokens = normal(3, 8), normal(3, 5, 8, seed=1)
    expected = theirs(query.unsqueeze(1), tokens, tokens)[0].squeeze(1)
    torch.testing.assert_close(ours(query, *ours.keys_values(tokens)), expected)


# ---- the machine


def slow_ticks(model, x):
    """Return logits of each tick and image, (B, T, C), image by image, as the paper writes them."""
    keys, values = model.see(x)
    logits = torch.zeros(len(x), model.ticks, model.num_classes, dtype=torch.float64)
    for b in range(len(x)):
        history = [model.start_history[:, m] for m in range(model.start_history.shape[1])]
        active = [model.start_active]
        for t in range(model.ticks):
            past = torch.stack(active).unsqueeze(-1)
            asks = model.q_proj(direct(past, model.action.pairs, model.action.decay)[:, 0])
            seen = model.attention(asks[None], keys[b : b + 1], values[b : b + 1])[0]
            history.append(model.synapses(torch.cat((seen, active[-1]))[None])[0])
            memory = torch.stack(history[-model.start_history.shape[1] :], -1)
            active.append(model.neurons(memory.unsqueeze(1), model.neurons.matrices())[:, 0])
            past = torch.stack(active).unsqueeze(-1)
            logits[b, t] = model.head(direct(past, model.out.pairs, model.out.decay)[:, 0])
    return logits


@pytest.mark.parametrize(
    "options",
    [
        {"pairing": "random-pairing", "self_pairs": 2, "synapse_depth": 2},
        {"pairing": "first-last", "memory_dim": 0},
        {"pairing": "random", "ticks": 2, "memory": 4},
    ],
)
def test_ticks_are_those_of_the_paper(options):
    model = moved(tiny(**options)).eval()
    with torch.no_grad():
        for each in (model.out, model.action):
            each.decay.copy_(normal(len(each.decay)).abs())
    x = normal(2, 3, 9, 14)
    found, slow = model.forward_ticks(x), slow_ticks(model, x)
    torch.testing.assert_close(found, slow)
    inputs = (model.start_history, model.start_active, model.out.decay, model.action.decay, model.q_proj.weight)
    weights = normal(*found.shape, seed=4)
    for one, other in zip(*(torch.autograd.grad((value * weights).sum(), inputs) for value in (found, slow))):
        torch.testing.assert_close(one, other)


def test_sorting_sees_its_numbers_at_every_tick():
    torch.manual_seed(0)
    model = moved(SortingCTM(3, ticks=4, dim=18, synch_out=5, synapse_depth=2, memory=2)).eval()
    with torch.no_grad():
        model.out.decay.abs_()
    x = normal(2, 3)
    history, active = [model.start_history[:, m].expand(2, -1) for m in range(2)], [model.start_active.expand(2, -1)]
    for _ in range(4):
        history.append(model.synapses(torch.cat((x, active[-1]), 1)))
        memory = torch.stack(history[-2:], -1).transpose(0, 1)
        active.append(model.neurons(memory, model.neurons.matrices()).T)
    past = torch.stack(active).transpose(1, 2)
    slow = [model.head(direct(past[: t + 2], model.out.pairs, model.out.decay).T) for t in range(4)]
    torch.testing.assert_close(model(x), torch.stack(slow, 1))
    assert model(x).shape == (2, 4, 4)


def test_what_a_sorting_machine_says_is_read_without_blanks_and_repeats():
    paths = torch.tensor([[3, 1, 1, 3, 1, 0, 2], [3, 3, 3, 3, 3, 3, 3]])
    assert sorted_places(nn.functional.one_hot(paths, 4)) == [[1, 0, 2], []]


def test_bits_are_told_apart_by_sign_and_angle():
    torch.manual_seed(0)
    module = Bits(6).double()
    x = torch.tensor([[1.0, -1, -1, 1, -1]], dtype=torch.float64)
    found = module(x)
    for place in range(5):
        angle = math.pi * place / 4
        start = torch.tensor([-math.sin(angle), math.cos(angle)], dtype=torch.float64)
        torch.testing.assert_close(found[0, place], module.sign.weight[int(x[0, place] > 0)] + module.place(start))
    model = ParityCTM(5, **TINY)
    assert model(x.float()).shape == (1, 10)
    assert model.positions == 5


def test_certainty_is_one_less_the_entropy_of_a_mean_position():
    model = tiny(num_classes=6, positions=2)
    logits = normal(2, 3, 6)
    for b in range(2):
        for t in range(3):
            entropies = []
            for place in range(2):
                p = logits[b, t, 3 * place : 3 * place + 3].softmax(0)
                entropies.append(float(-(p * p.log()).sum()) / math.log(3))
            assert float(model.certainty(logits)[b, t]) == pytest.approx(1 - sum(entropies) / 2)
    assert tiny(num_classes=1).certainty(torch.zeros(2, 1)).tolist() == [1, 1]


def test_the_tick_that_answers():
    model = tiny().eval()
    x = torch.randn(6, 3, 12, 12)
    features, logits = model.forward_features(x), model.forward_ticks(x)
    tick = model.certainty(logits).argmax(1)
    rows = torch.arange(6)
    torch.testing.assert_close(model(x), logits[rows, tick])
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[rows, tick])
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), features[:, -1])
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(x), features.mean(1))
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    model.reset_classifier(5, "last")
    torch.testing.assert_close(model(x), model.head(features[:, -1]))


def test_thought_ends_when_it_is_certain():
    torch.manual_seed(1)
    model = tiny(ticks=6, temperature=0.2).eval()
    with torch.no_grad():
        model.head.weight.mul_(6)
    x = torch.randn(12, 3, 12, 12)
    logits = model.forward_ticks(x)
    certainty = model.certainty(logits)
    for bound in (2.0, float(certainty.median()), float(certainty.quantile(0.9)), 0.0):
        answers, ticks = model.forward_until(x, bound)
        for b in range(12):
            over = (certainty[b] >= bound - 1e-7).nonzero().flatten()
            expected = int(over[0]) + 1 if len(over) else 6
            assert int(ticks[b]) == expected
            torch.testing.assert_close(answers[b], logits[b, int(certainty[b, :expected].argmax())])
    assert len(set(model.forward_until(x, float(certainty.median()))[1].tolist())) > 2
    answers, ticks = SortingCTM(3, ticks=4, dim=18, synch_out=5, memory=2).forward_until(torch.randn(2, 3), 2.0)
    assert answers.shape == (2, 4)
    assert ticks.tolist() == [4, 4]


def test_keys_and_values_are_computed_once():
    model = tiny()
    calls = []
    model.kv_proj.register_forward_hook(lambda *_: calls.append(1))
    model(torch.zeros(1, 3, 8, 8))
    assert len(calls) == 1


def test_dropout_is_where_it_is_published():
    model = tiny(drop_rate=0.3, nlm_drop_rate=0.0, synapse_depth=2)
    assert [layer.drop.p for layer in model.neurons.layers] == [0, 0]
    assert model.attention.drop == model.synapses.down[0][0].p == 0.3
    assert [layer.drop.p for layer in tiny(drop_rate=0.3).neurons.layers] == [0.3, 0.3]
    # As published, what synapses are told is whole, unless they are one layer.
    assert (model.synapses.first[0].p, tiny(drop_rate=0.3).synapses[0].p) == (0, 0.3)
    attention, seen = model.attention, (torch.randn(2, 8), *torch.randn(2, 2, 2, 5, 4))
    assert torch.equal(attention.eval()(*seen), attention(*seen))
    assert not torch.equal(attention.train()(*seen), attention(*seen))


def test_weights_begin_as_published():
    model = create_model("ctm_cifar10", num_classes=10)
    layer = model.neurons.layers[0]
    bounds = {
        "neurons.layers.0.weight": 1 / math.sqrt(15 + 128),
        "neurons.layers.1.weight": 1 / math.sqrt(64 + 2),
        "start_history": 1 / math.sqrt(256 + 15),
        "start_active": 1 / math.sqrt(256),
        "attention.qkv.weight": math.sqrt(6 / (4 * 64)),
    }
    parameters = dict(model.named_parameters())
    for name, bound in bounds.items():
        assert float(parameters[name].detach().abs().max()) == pytest.approx(bound, rel=0.02), name
    for name in ("attention.qkv.bias", "attention.proj.bias", "neurons.layers.0.bias", "out.decay", "action.decay"):
        assert not parameters[name].any(), name
    assert layer.temperature.tolist() == [1]


def test_the_backbone_is_a_resnet_that_sees_little():
    module = Backbone(1, (2, 1), True, 4, nn.BatchNorm2d)
    assert module.num_features == 4 * 2 * 4
    assert module(torch.zeros(1, 1, 33, 20)).shape == (1, 32, 9, 5)
    assert (module.conv1.stride, module.conv1.kernel_size) == ((1, 1), (3, 3))
    x, inside = torch.randn(1, 1, 9, 9), []
    module.stages.register_forward_pre_hook(lambda _, given: inside.append(given[0]))
    module.eval()(x)
    expected = nn.functional.max_pool2d(torch.relu(module.bn1(module.conv1(module.rgb(x)))), 3, 2, 1)
    torch.testing.assert_close(inside[0], expected)


def test_variants_are_as_published():
    counts = {"imagenet": (185_989_886, 1000), "imagenet_75": (244_176_756, 1000), "cifar10": (1_032_648, 10)}
    counts |= {"maze_large": (31_998_330, 500), "maze_medium": (20_176_510, 500), "maze_small": (8_511_992, 250)}
    for name, (count, classes) in counts.items():
        with torch.device("meta"):
            model = create_model(f"ctm_{name}", num_classes=classes)
        assert count_parameters(model) == count, name
        assert (model.ticks, model.positions) == {"large": (75, 100), "medium": (75, 100), "small": (50, 50)}.get(
            name.removeprefix("maze_"), (75 if name == "imagenet_75" else 50, 1)
        )
    ticks = {(1, 1): 4_908_706, (10, 5): 5_043_874, (25, 10): 5_212_834, (50, 25): 5_719_714, (100, 50): 6_564_514}
    for (length, memory), count in ticks.items():
        with torch.device("meta"):
            model = ParityCTM(ticks=length, memory=memory)
        assert count_parameters(model) == count
    with torch.device("meta"):
        assert count_parameters(SortingCTM()) == 897_197


def test_variants_pair_and_attend_as_published():
    narrow = {"depths": (1,), "bottleneck": False, "width": 4, "dim": 200, "input_dim": 16, "synapse_depth": 1}
    narrow |= {"memory_dim": 1, "num_classes": 100}
    heads = {"imagenet": 16, "imagenet_75": 16, "cifar10": 16, "maze_large": 16, "maze_medium": 8, "maze_small": 4}
    models = {name: create_model(f"ctm_{name}", **narrow) for name in heads}
    assert {name: model.attention.num_heads for name, model in models.items()} == heads
    for name, (outs, actions, same) in {
        "imagenet": (8196, 2048, 32),
        "imagenet_75": (11_325, 11_325, 0),
        "cifar10": (256, 512, 0),
        "maze_small": (128, 128, 0),
    }.items():
        out, action = models[name].out.pairs, models[name].action.pairs
        assert (out.shape[1], action.shape[1]) == (outs, actions)
        for pairs in (out, action):
            own = pairs[0] == pairs[1]
            assert own[:same].all()
            assert own[same:].float().mean() < 0.05
    for name in ("maze_large", "maze_medium"):
        assert torch.equal(models[name].out.pairs, torch.triu_indices(64, 64))
        assert torch.equal(models[name].action.pairs, torch.triu_indices(32, 32) + 168)


# ---- the authors' weights


THEIRS = {
    "backbone.rgb.": "initial_rgb.",
    "bits.sign.": "backbone.embedding.",
    "bits.place.": "positional_embedding.projection.",
    "backbone.stages.0.": "backbone.layer1.",
    "backbone.stages.1.": "backbone.layer2.",
    "attention.qkv.": "attention.in_proj_",
    "attention.proj.": "attention.out_proj.",
    "synapses.first.1.": "synapses.first_projection.0.",
    "synapses.first.2.": "synapses.first_projection.1.",
    "synapses.down.": "synapses.down_projections.",
    "synapses.up.": "synapses.up_projections.",
    "synapses.norms.": "synapses.skip_lns.",
    "start_active": "start_activated_state",
    "start_history": "start_trace",
    "action.decay": "decay_params_action",
    "out.decay": "decay_params_out",
    "head.": "output_projector.0.",
}


def authors(model, sides):
    theirs = {}
    for key, value in model.state_dict().items():
        if key.endswith(".pairs"):
            for side, indices in zip(("left", "right"), sides[key.partition(".")[0]]):
                theirs[f"{key.partition('.')[0]}_neuron_indices_{side}"] = indices
        elif key.startswith("neurons."):
            _, _, layer, kind = key.split(".")
            name, order = {"weight": ("w1", (1, 2, 0)), "bias": ("b1", (1, 0, 2)), "temperature": ("T", (0,))}[kind]
            theirs[f"trace_processor.0.{2 * int(layer)}.{name}"] = value.permute(order)
        else:
            own = next((own for own in THEIRS if key.startswith(own)), "")
            theirs[THEIRS.get(own, "") + key[len(own) :]] = value
    return theirs


@pytest.mark.parametrize("pairing", ["random", "random-pairing"])
def test_the_authors_keys_become_ours(pairing):
    sides = {name: torch.randint(20, (2, count)) for name, count in (("out", 6), ("action", 5))}
    for build in (lambda: tiny(pairing=pairing, synapse_depth=2), lambda: ParityCTM(5, pairing=pairing, **TINY)):
        one, other = build(), build()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter += 1
        theirs = authors(other, sides)
        assert {"trace_processor.0.2.w1", "attention.in_proj_weight", "decay_params_out", "start_trace"} <= set(theirs)
        for given in (
            theirs,
            {"model_state_dict": theirs, "iteration": 3},
            {f"module.{k}": v for k, v in theirs.items()},
        ):
            one.load_state_dict(checkpoint_filter_fn(given, one), strict=True)
        for name, parameter in other.named_parameters():
            assert torch.equal(dict(one.named_parameters())[name], parameter), name
        rows, columns = torch.triu_indices(6, 6) if pairing == "random" else (slice(None), slice(None))
        assert torch.equal(one.out.pairs, torch.stack((sides["out"][0][rows], sides["out"][1][columns])))
        assert checkpoint_filter_fn(one.state_dict(), one).keys() == one.state_dict().keys()


def test_any_size_and_what_is_not_decayed():
    model = tiny().eval()
    for size in ((28, 28), (45, 61), (225, 190)):
        assert model(torch.zeros(1, 3, *size)).shape == (1, 4)
    assert model.no_weight_decay() == {"start_history", "neurons.*.bias"}
    assert Thought._fields == ("history", "active", "total")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ticks": 0}, "ticks = 0 .*1 or more"),
        ({"memory": 0}, "memory = 0"),
        ({"positions": 3}, "num_classes = 4 is no multiple of positions = 3"),
        ({"num_heads": 3}, "num_heads = 3 does not divide input_dim = 8"),
        ({"pairing": "nearest"}, "unknown pairing 'nearest'"),
        ({"pairing": "first-last", "synch_out": 16}, "synch_out = 16 .*more than dim = 20"),
        ({"synch_action": 0}, "0 neurons of 20"),
        ({"self_pairs": 6}, "self_pairs = 6 .*6 pairs"),
        ({"synapse_depth": 2, "dim": 15}, "dim = 15 .*16 or more"),
        ({"temperature": 0.0}, "temperature = 0.0 .*above 0"),
        ({"global_pool": "max"}, "global_pool = 'max' .*certain, last or avg"),
        ({"global_pool": ""}, "global_pool = ''"),
        ({"depths": ()}, r"depths = \(\)"),
        ({"depths": (1, 0)}, "depths = .*one to four stages"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)


def test_nothing_is_certain_without_a_classifier():
    with pytest.raises(InputError, match="reset_classifier first"):
        tiny(num_classes=0).forward_until(torch.zeros(1, 3, 8, 8))


def test_the_lstm_of_the_check_is_of_the_machines_size():
    machine = ParityCTM(16, ticks=4, **NET)
    lstm = lstm_like(machine, Size())
    assert count_parameters(lstm) == pytest.approx(count_parameters(machine), rel=0.02)
    x = torch.randn(2, 16).sign()
    hidden, cell = (start.expand(2, -1) for start in lstm.start)
    seen = lstm.attention.keys_values(lstm.kv_proj(lstm.bits(x)))
    for tick in range(4):
        hidden, cell = lstm.cell(lstm.attention(lstm.q_proj(hidden), *seen), (hidden, cell))
        torch.testing.assert_close(lstm.forward_ticks(x)[:, tick], lstm.head(hidden))
    assert recursion_gap() < 1e-12
