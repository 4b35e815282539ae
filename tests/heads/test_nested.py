"""Rising slope, nested prefixes and the classifiers that only train."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmcli.heads.config import ClassifierConfig, FusionConfig, HashConfig, LossConfig
from mmcli.heads.hashing import HashLayer, binarise, pack_codes
from mmcli.heads.losses import total_loss
from mmcli.heads.model import Head


def make(seed: int = 0, **hashed: object) -> Head:
    torch.manual_seed(seed)
    fusion = FusionConfig(type="hadamard", mlp_dims=(24, 16), dropout=0.0)
    return Head(fusion, HashConfig(**{"bits": 24, **hashed}), ClassifierConfig(num_classes=3), width=6)


def test_the_slope_rises_and_stays_in_the_checkpoint() -> None:
    layer, z = HashLayer(HashConfig(bits=8, beta=5.0, batch_norm=False), 4), torch.randn(6, 4)
    u, place = layer.linear(z), layer.beta.data_ptr()
    for progress, beta in ((0.0, 1.0), (0.5, 3.0), (1.0, 5.0)):
        layer.set_progress(progress)
        assert float(layer.beta) == beta
        torch.testing.assert_close(layer(z), torch.tanh(beta * u))
        assert torch.equal(binarise(layer(z)), binarise(u))  # codes do not depend on the slope
    assert layer.beta.data_ptr() == place
    other = HashLayer(layer.config, 4)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(z), layer(z))


def test_without_continuation_progress_changes_nothing() -> None:
    layer = HashLayer(HashConfig(bits=8), 4)
    layer.set_progress(1.0)
    assert layer.beta is None
    assert "beta" not in layer.state_dict()


@pytest.mark.parametrize(
    ("nested", "bits", "wanted"),
    [((), 24, ()), ((8,), 24, (8, 24)), ((8, 16, 24, 32), 24, (8, 16, 24)), ((32,), 24, (24,)), ((8,), 0, ())],
)
def test_prefixes_are_those_below_the_code_and_the_code(nested: tuple, bits: int, wanted: tuple) -> None:
    config = HashConfig(bits=bits, nested=nested)
    assert config.prefixes == wanted
    assert HashConfig(bits=bits, code_classifier=True, nested=nested).prefixes == (wanted or (bits,) * bool(bits))
    if bits:
        assert [layer.in_features for layer in make(bits=bits, nested=nested).prefix_classifiers] == list(wanted)


@pytest.mark.parametrize("nested", [(12,), (16, 8), (8, 8), (0,)])
def test_prefixes_that_are_no_codes_are_refused(nested: tuple) -> None:
    with pytest.raises(ValueError, match="nested"):
        HashConfig(nested=nested)


@given(st.integers(0, 2**32 - 1), st.sampled_from([8, 16, 24]))
def test_a_prefix_of_a_packed_code_is_the_packed_prefix(seed: int, length: int) -> None:
    b = binarise(np.random.default_rng(seed).normal(size=(5, 24)))
    packed = pack_codes(b)
    np.testing.assert_array_equal(packed[:, : length // 8], pack_codes(b[:, :length]))


def test_training_classifiers_rest_in_evaluation() -> None:
    head, v = make(nested=(8, 16), fused_classifier=True), torch.randn(7, 6)
    output = head.train()(v, v)
    torch.testing.assert_close(output.fused_logits, head.fused_classifier(output.z))
    hard = binarise(output.h).float()
    for length, reader, logits in zip((8, 16, 24), head.prefix_classifiers, output.prefix_logits, strict=True):
        torch.testing.assert_close(logits, reader(hard[:, :length]))
    rest = head.eval()(v, v)
    assert rest.fused_logits is None
    assert rest.prefix_logits == ()
    plain = make().train()(v, v)
    assert plain.fused_logits is None
    assert plain.prefix_logits == ()


def test_a_prefix_trains_its_bits_alone() -> None:
    head, v = make(nested=(8,), batch_norm=False), torch.randn(7, 6)
    short = head.train()(v, v).prefix_logits[0]
    short.sum().backward()
    rows = head.hash.linear.weight.grad.abs().sum(1)
    assert (rows[:8] > 0).all()
    assert (rows[8:] == 0).all()
    got = head.hash.linear.weight.grad.clone()
    head.zero_grad()
    head.prefix_classifiers[0](head(v, v).h[:, :8]).sum().backward()
    torch.testing.assert_close(head.hash.linear.weight.grad, got)


def test_every_parameter_is_in_one_group_and_is_trained() -> None:
    head, v = make(nested=(8,), fused_classifier=True), torch.randn(7, 6)
    grouped = [id(parameter) for group in head.parameter_groups().values() for parameter in group]
    assert sorted(grouped) == sorted(id(parameter) for parameter in head.parameters())
    total_loss(LossConfig(), head.train()(v, v), torch.ones(7, 3)).loss.backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_without_bits_nothing_guides() -> None:
    head, v = make(bits=0, nested=(8,), fused_classifier=True), torch.randn(7, 6)
    output = head.train()(v, v)
    assert head.fused_classifier is None
    assert output.prefix_logits == ()
    assert total_loss(LossConfig(), output, torch.ones(7, 3)).fused is None


def test_a_short_prefix_learns_as_a_code_of_its_own() -> None:
    """Four groups of points; after training, the nearest other code by the first byte is one of the same group."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(64) % 4
    v = torch.nn.functional.one_hot(group, 6).float() * 2 + 0.3 * torch.randn(64, 6, generator=generator)
    head = make(nested=(8,), fused_classifier=True).train()
    y = torch.nn.functional.one_hot(group, 4).float()[:, :3]
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        total_loss(LossConfig(hash_weight=0.0), head(v, v), y).loss.backward()
        optimizer.step()
    code = binarise(head.eval()(v, v).h[:, :8]).float()
    likeness = (code @ code.T).fill_diagonal_(-99)
    assert (group[likeness.argmax(1)] == group).float().mean() > 0.95


def test_inputs_are_dropped_in_training_alone() -> None:
    config = FusionConfig(type="hadamard", mlp_dims=(8,), dropout=0.0, input_dropout=0.5)
    head, v = Head(config, HashConfig(bits=0), ClassifierConfig(), width=6), torch.randn(5, 6)
    assert not torch.equal(head.train()(v, v).z, head(v, v).z)
    assert torch.equal(head.eval()(v, v).z, head(v, v).z)
