"""The network computes what the public implementation computes, and refuses what it cannot compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from htnet import HTNet, HTNetConfig
from htnet.checkpoint import from_upstream
from htnet.model import BlockAggregation, LocalAttention, attention_backend

GOLDEN = Path(__file__).parent / "golden"
CASES = ("seq1", "seq4", "seq16_oddheads")
TINY = HTNetConfig(image_size=16, patch_size=2, dim=12, heads=3, depths=(1, 1, 1))  # 4 tokens per block
TINY_SHORT_CUT = HTNetConfig(image_size=8, patch_size=2, dim=12, heads=3, depths=(1, 1, 1))  # 1 token per block


def load_golden(case: str) -> dict[str, np.ndarray]:
    """All arrays of a case; seq1 is split over files of less than 1 MiB."""
    arrays: dict[str, np.ndarray] = {}
    for path in (*GOLDEN.glob(f"htnet_{case}.npz"), *GOLDEN.glob(f"htnet_{case}_part*.npz")):
        with np.load(path) as file:
            arrays.update({key: file[key] for key in file.files})
    return arrays


def weights(golden: dict[str, np.ndarray], prefix: str) -> dict[str, torch.Tensor]:
    return from_upstream(
        {k.removeprefix(prefix): torch.from_numpy(v) for k, v in golden.items() if k.startswith(prefix)}
    )


def golden_config(golden: dict[str, np.ndarray], backend: str = "auto") -> HTNetConfig:
    def number(name: str) -> int:
        return int(golden[f"config/{name}"])

    return HTNetConfig(
        image_size=number("image_size"),
        patch_size=number("patch_size"),
        dim=number("dim"),
        heads=number("heads"),
        levels=number("num_hierarchies"),
        depths=tuple(golden["config/block_repeats"].tolist()),
        num_classes=number("num_classes"),
        attention_backend=backend,
    )


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest value; differences up to the floor of 1e-7 count as none."""
    worst = (actual.double() - expected.double()).abs().max().item()
    return 0.0 if worst <= 1e-7 else worst / max(expected.double().abs().max().item(), 1e-30)


@pytest.fixture(params=CASES)
def golden(request):
    return load_golden(request.param)


@pytest.fixture(params=["reference", "sdpa"])
def golden_model(request, golden):
    model = HTNet(golden_config(golden, request.param))
    model.load_state_dict(weights(golden, "state/"))
    return model


def test_logits_and_every_gradient_are_those_of_the_public_implementation(golden, golden_model):
    logits = golden_model(torch.from_numpy(golden["input"]))
    assert relative_error(logits, torch.from_numpy(golden["logits"])) < 1e-5
    F.cross_entropy(logits, torch.from_numpy(golden["labels"])).backward()
    expected = weights(golden, "grad/")
    actual = {name: parameter.grad for name, parameter in golden_model.named_parameters()}
    assert actual.keys() == expected.keys()
    # what follows the last position embedding ignores a constant added to all channels, so its gradient is zero and
    # both networks hold rounding noise only
    last = f"levels.{len(golden_model.levels) - 1}.pos_emb"
    assert max(actual.pop(last).abs().max(), expected.pop(last).abs().max()) < 5e-7
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert {name: error for name, error in errors.items() if error >= 1e-5} == {}


def test_five_steps_of_adam_lead_where_the_public_implementation_gets(golden, golden_model):
    images, labels = torch.from_numpy(golden["input"]), torch.from_numpy(golden["labels"])
    adam = torch.optim.Adam(golden_model.parameters(), lr=5e-5)
    losses = []
    for _ in range(5):
        adam.zero_grad()
        loss = F.cross_entropy(golden_model(images), labels)
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert relative_error(torch.tensor(losses), torch.from_numpy(golden["adam_lr5e-5_losses"])) < 1e-5
    assert relative_error(golden_model(images), torch.from_numpy(golden["logits_after_5_steps"])) < 1e-5


def test_with_one_token_per_block_queries_and_keys_get_zero_gradients_and_never_change():
    torch.manual_seed(0)
    model = HTNet(TINY_SHORT_CUT)
    attention = model.levels[0].layers[0].attention
    before, inner = attention.qkv.weight.detach().clone(), attention.out.in_features
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    F.cross_entropy(model(torch.rand(4, 3, 8, 8)), torch.tensor([0, 1, 2, 0])).backward()
    adam.step()
    assert torch.equal(attention.qkv.weight.grad[: 2 * inner], torch.zeros(2 * inner, 12))
    assert torch.equal(attention.qkv.weight[: 2 * inner], before[: 2 * inner])
    assert not torch.equal(attention.qkv.weight[2 * inner :], before[2 * inner :])


def test_the_short_cut_for_one_token_per_block_equals_the_general_way():
    torch.manual_seed(0)
    attention = LocalAttention(20, 3, blocks_per_side=4, tokens_per_block=1, dropout=0.0, backend="reference").double()
    x = torch.randn(2, 4, 4, 20, dtype=torch.float64)
    query, key, value = attention.qkv(x).view(-1, 1, 3, 3, 6).permute(2, 0, 3, 1, 4)
    general = F.scaled_dot_product_attention(query, key, value).reshape(2, 4, 4, 18)
    torch.testing.assert_close(attention(x), attention.out(general), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5])
def test_aggregation_is_convolution_then_norm_then_pool_for_maps_of_any_size(side):
    torch.manual_seed(0)
    aggregation = BlockAggregation(6, 12).double()
    x = torch.randn(2, side, side, 6, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x.permute(0, 3, 1, 2), aggregation.weight.permute(0, 3, 1, 2), aggregation.bias, padding=1)
    y = F.layer_norm(y.permute(0, 2, 3, 1), (12,)).permute(0, 3, 1, 2)
    expected = F.max_pool2d(y, 3, 2, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(aggregation(x), expected)
    (ours,) = torch.autograd.grad(aggregation(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_the_default_network_has_the_papers_139_582_982_parameters():
    with torch.device("meta"):
        model = HTNet(HTNetConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 139_582_982


def test_linear_layers_start_as_torch_initialises_the_1x1_convolutions_of_upstream():
    torch.manual_seed(3)
    convolution = torch.nn.Conv2d(12, 7, 1)
    torch.manual_seed(3)
    linear = torch.nn.Linear(12, 7)
    assert torch.equal(convolution.weight.flatten(1), linear.weight)
    assert torch.equal(convolution.bias, linear.bias)
    torch.manual_seed(3)
    aggregation = BlockAggregation(40, 80)
    bound = (9 * 40) ** -0.5
    assert 0.99 * bound < aggregation.weight.abs().max() <= bound


def test_names_without_weight_decay_are_parameters_biases_norms_and_position_embeddings():
    model = HTNet(TINY)
    names = {name for name, _ in model.named_parameters()}
    spared = model.no_weight_decay()
    assert spared < names
    assert {name for name in names if name.endswith("bias") or "norm" in name or "pos_emb" in name} == spared


@pytest.mark.parametrize("config", [TINY, TINY_SHORT_CUT])
def test_recomputing_activations_changes_no_gradient(config):
    torch.manual_seed(0)
    model = HTNet(config)
    x = torch.rand(2, 3, config.image_size, config.image_size)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    actual = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("config", [TINY, TINY_SHORT_CUT])
def test_dropout_acts_in_training_only(config):
    torch.manual_seed(0)
    model = HTNet(HTNetConfig(**{**config.__dict__, "dropout": 0.5}))
    x = torch.rand(2, 3, config.image_size, config.image_size)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_features_and_head_together_are_the_forward_pass():
    model = HTNet(TINY)
    x = torch.rand(2, 3, 16, 16)
    features = model.forward_features(x)
    assert features.shape == (2, 2, 2, 48)
    assert torch.equal(model.forward_head(features), model(x))


def test_a_bfloat16_network_takes_float32_mosaics():
    model = HTNet(TINY).to(torch.bfloat16)
    assert model(torch.rand(2, 3, 16, 16)).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 1, 16, 16), (2, 3, 16, 8), (2, 3, 28, 28)])
def test_input_of_the_wrong_shape_is_refused_with_both_shapes(shape):
    with pytest.raises(ValueError, match=r"\(B, 3, 16, 16\), got \(" + ", ".join(map(str, shape))):
        HTNet(TINY)(torch.rand(*shape))


def test_integer_input_is_refused():
    with pytest.raises(TypeError, match="uint8"):
        HTNet(TINY)(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_the_environment_overrides_the_configured_backend(monkeypatch):
    assert attention_backend("sdpa") == "sdpa"
    monkeypatch.setenv("HTNET_ATTENTION", "reference")
    assert HTNet(TINY).levels[0].layers[0].attention.backend == "reference"
    monkeypatch.setenv("HTNET_ATTENTION", "fast")
    with pytest.raises(ValueError, match="HTNET_ATTENTION must be one of auto, reference, sdpa, triton, got 'fast'"):
        HTNet(TINY)


def test_printing_the_network_shows_configuration_and_backend():
    text = repr(HTNet(TINY))
    assert "image_size=16" in text
    assert "tokens_per_block=4, backend=auto" in text
