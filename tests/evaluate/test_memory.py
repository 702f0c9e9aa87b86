import torch

from vitrail.evaluate.memory import peak_bytes, training_peak


def test_a_peak_is_of_what_lives_at_a_time():
    x = torch.ones(1000)
    assert peak_bytes(lambda: x + 1) == 4000
    assert peak_bytes(lambda: (x + 1) * (x + 2)) == 12000

    def one_after_the_other():
        for _ in range(5):
            x + 1

    assert peak_bytes(one_after_the_other) == 4000


def test_what_was_there_before_and_its_views_are_not_counted():
    x = torch.ones(1000)
    assert peak_bytes(lambda: x.view(10, 100).add_(1)) == 0
    assert peak_bytes(lambda: (x + 1).view(10, 100).T) == 4000
    assert peak_bytes(lambda: x[:10].clone()) == 40


def test_a_training_peak_is_of_both_passes():
    layer = torch.nn.Linear(100, 200, bias=False)
    x = torch.ones(50, 100)
    forward = peak_bytes(lambda: layer(x))
    assert forward == 4 * 50 * 200
    # At the end the gradients of the output and of the weights are there.
    assert training_peak(layer, x) >= forward + 4 * 100 * 200
    assert layer.weight.grad is None
