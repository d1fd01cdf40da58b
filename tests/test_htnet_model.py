"""The network computes what the public implementation computes, and refuses what it cannot compute."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from htnet import HTNet, HTNetConfig
from htnet.checkpoint import from_upstream
from htnet.model import BlockAggregation, LocalAttention, _conv, _conv_2x2, _element_size, attention_backend
from kernels.testing import BLOCK_TOLERANCES, assert_close

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


def relative_error(actual: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """Largest difference relative to the largest value; differences up to the floor of 1e-7 count as none.

    None is the gradient of what is not trained, and is like None alone.
    """
    if actual is None or expected is None:
        return 0.0 if actual is expected else float("inf")
    worst = (actual.double() - expected.double()).abs().max().item()
    return 0.0 if worst <= 1e-7 else worst / max(expected.double().abs().max().item(), 1e-30)


def gradients(model: HTNet) -> dict[str, torch.Tensor]:
    """Gradients by the names of the state dict, which packs parameters; zero for what is not trained."""
    holder = HTNet(model.config)
    for slot, parameter in zip(holder.parameters(), model.parameters(), strict=True):
        slot.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return holder.state_dict()


@pytest.fixture(params=CASES)
def golden(request):
    return load_golden(request.param)


@pytest.fixture(params=["reference", "sdpa"])
def golden_model(request, golden):
    model = HTNet(golden_config(golden, request.param))
    model.load_state_dict(weights(golden, "state/"))
    return model


def test_logits_and_gradients_are_those_of_the_public_code(golden, golden_model):
    """The logits and every gradient are those of the public implementation."""
    logits = golden_model(torch.from_numpy(golden["input"]))
    assert relative_error(logits, torch.from_numpy(golden["logits"])) < 1e-5
    F.cross_entropy(logits, torch.from_numpy(golden["labels"])).backward()
    expected = weights(golden, "grad/")
    actual = gradients(golden_model)
    assert actual.keys() == expected.keys()
    # what follows the last position embedding ignores a constant added to all channels, so its gradient is zero and
    # both networks hold rounding noise only
    last = f"levels.{len(golden_model.levels) - 1}.pos_emb"
    assert max(actual.pop(last).abs().max(), expected.pop(last).abs().max()) < 5e-7
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert {name: error for name, error in errors.items() if error >= 1e-5} == {}


def test_five_steps_of_adam_follow_the_public_code(golden, golden_model):
    """Five steps of Adam lead to the point that the public implementation reaches."""
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


def test_queries_and_keys_of_one_token_blocks_never_change():
    """With one token per block, queries and keys get zero gradients and never change."""
    torch.manual_seed(0)
    model = HTNet(TINY_SHORT_CUT)
    key, untrained = "levels.0.layers.0.attention.qkv.weight", 2 * 12
    before = model.state_dict()[key]
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    F.cross_entropy(model(torch.rand(4, 3, 8, 8)), torch.tensor([0, 1, 2, 0])).backward()
    adam.step()
    after = model.state_dict()[key]
    assert torch.equal(gradients(model)[key][:untrained], torch.zeros(untrained, 12))
    assert torch.equal(after[:untrained], before[:untrained])
    assert (after[untrained:] != before[untrained:]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_queries_and_keys_are_saved_with_the_values(dtype):
    """Untrained queries and keys are saved and loaded in one matrix with the values."""
    tokens_of_one = HTNet(TINY_SHORT_CUT).to(dtype)
    state = tokens_of_one.state_dict()
    several = HTNet(HTNetConfig(**{**TINY_SHORT_CUT.__dict__, "image_size": 16})).state_dict()
    shapes = {name: value.shape for name, value in several.items() if "pos_emb" not in name}
    assert {name: value.shape for name, value in state.items() if "pos_emb" not in name} == shapes
    assert {value.dtype for value in state.values()} == {dtype}
    other = HTNet(TINY_SHORT_CUT).to(dtype)
    other.load_state_dict(state, strict=True)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in tokens_of_one.parameters()]
    key = "levels.1.layers.0.attention.qkv.weight"
    with pytest.raises(RuntimeError, match=r"size mismatch for levels\.1\.layers\.0\.attention\.qkv\.value"):
        other.load_state_dict(state | {key: state[key][:-1]})
    with pytest.raises(RuntimeError, match=r"Missing key.*levels\.1\.layers\.0\.attention\.qkv"):
        other.load_state_dict({name: value for name, value in state.items() if name != key})


def test_one_token_blocks_start_with_the_usual_weights():
    """Blocks of one token start with the weights of larger ones."""
    states = []
    for tokens in (1, 4):
        torch.manual_seed(0)
        states.append(LocalAttention(20, 3, 4, tokens, dropout=0.0, backend="auto").state_dict())
    one, four = states
    assert list(one) == list(four)
    assert all(torch.equal(one[name], four[name]) for name in four)


def test_the_short_cut_for_one_token_equals_the_general_way():
    """The short cut for one token per block equals the general way."""
    torch.manual_seed(0)
    attention = LocalAttention(20, 3, blocks_per_side=4, tokens_per_block=1, dropout=0.0, backend="reference").double()
    x = torch.randn(2, 4, 4, 20, dtype=torch.float64)
    qkv = F.linear(x, attention.state_dict()["qkv.weight"])
    query, key, value = qkv.view(-1, 1, 3, 3, 6).permute(2, 0, 3, 1, 4)
    general = F.scaled_dot_product_attention(query, key, value).reshape(2, 4, 4, 18)
    torch.testing.assert_close(attention(x), attention.out(general), rtol=1e-13, atol=1e-13)


def test_one_map_of_values_and_output_changes_no_result():
    """Many tokens go through values and output as one map, with the same result and gradients."""
    torch.manual_seed(0)
    attention = LocalAttention(
        dim=16, heads=3, blocks_per_side=2, tokens_per_block=1, dropout=0.0, backend="sdpa"
    )  # inner dimension 15
    few = torch.randn(4, 2, 2, 16)  # 16 tokens, no more than channels
    many = few.repeat(3, 1, 1, 1)
    results, gradients = [], []
    for x in (few, many):
        attention.zero_grad()
        out = attention(x)
        (out.square().sum() / len(x)).backward()
        results.append(out.detach())
        gradients.append([p.grad.clone() for p in attention.parameters() if p.requires_grad])
    torch.testing.assert_close(results[1], results[0].repeat(3, 1, 1, 1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


def attended(attention, x, *, padded):
    """Output and gradients of input and weights, dropout drawn alike."""
    attention.zero_grad()
    torch.manual_seed(1)
    leaf = x.clone().requires_grad_()
    out = attention.attend(leaf, padded=padded)
    gradients = torch.autograd.grad(out.square().sum(), [leaf, *(p for p in attention.parameters() if p.requires_grad)])
    return out.detach(), *gradients


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("tokens", "batch"), [(4, 2), (1, 2), (1, 40)], ids=["4", "1", "1-one-map"])
def test_padded_heads_compute_the_same_function(tokens, batch, dropout):
    """In float64, with heads of 5 and of 85 channels; the inner dimensions 15 and 255 are no multiples of 8 either."""
    side = 2 * math.isqrt(tokens)
    for dim in (16, 256):
        torch.manual_seed(0)
        attention = LocalAttention(dim, 3, 2, tokens, dropout=dropout, backend="sdpa").double()
        x = torch.randn(batch, side, side, dim, dtype=torch.float64)
        plain, padded = (attended(attention, x, padded=way) for way in (False, True))
        torch.testing.assert_close(padded, plain, rtol=1e-11, atol=1e-11)


def assert_padding_costs_no_digits(device, tokens, dtype):
    torch.manual_seed(0)
    attention = LocalAttention(256, 3, 2, tokens, dropout=0.0, backend="auto").to(device, dtype)
    x = torch.randn(8, 4, 4, 256) if tokens == 4 else torch.randn(2, 2, 2, 256)
    x = x.to(device, dtype)
    exact = attended(copy.deepcopy(attention).cpu().double(), x.cpu().double(), padded=False)
    found = attended(attention, x, padded=True)
    allowed = BLOCK_TOLERANCES[dtype]
    for number, (actual, truth) in enumerate(zip(found, exact, strict=True)):
        assert_close(f"result {number}", actual, truth, allowed.backward if number else allowed.forward)
    if device == "cuda":
        torch.testing.assert_close(attention(x), found[0], rtol=0, atol=0)  # the module pads there by itself


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [4, 1])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_padded_heads_are_within_the_tolerances_of_16_bits(device, tokens, dtype):
    assert_padding_costs_no_digits(device, tokens, dtype)


def test_heads_on_a_cpu_are_computed_as_they_are(monkeypatch):
    monkeypatch.setattr("htnet.model.pad_heads", lambda *_: pytest.fail("padded"))
    for tokens in (1, 4):
        attention = LocalAttention(16, 3, 2, tokens, dropout=0.0, backend="auto").bfloat16()
        attention(torch.randn(1, 4, 4, 16, dtype=torch.bfloat16))


def test_the_size_of_an_element_follows_autocast():
    weight = torch.empty(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert _element_size(weight) == 2
    assert (_element_size(weight), _element_size(weight.half())) == (4, 2)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5])
def test_aggregation_is_convolution_then_norm_then_pool(side):
    """Aggregation is convolution, then norm, then pool, for maps of any size."""
    torch.manual_seed(0)
    aggregation = BlockAggregation(6, 12).double()
    x = torch.randn(2, side, side, 6, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x.permute(0, 3, 1, 2), aggregation.weight.permute(0, 3, 1, 2), aggregation.bias, padding=1)
    y = F.layer_norm(y.permute(0, 2, 3, 1), (12,)).permute(0, 3, 1, 2)
    expected = F.max_pool2d(y, 3, 2, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(aggregation(x), expected)
    inputs = (x, aggregation.weight, aggregation.bias)
    weight = torch.randn_like(expected)
    ours = torch.autograd.grad((aggregation(x) * weight).sum(), inputs)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    torch.testing.assert_close(ours, theirs)


@pytest.fixture
def small_map():
    """A 2x2 map with weight and bias, float64: what :func:`_conv_2x2` takes."""
    torch.manual_seed(0)
    shapes = ((3, 2, 2, 2), (4, 3, 3, 2), (4,))
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


def test_the_2x2_convolution_has_true_derivatives(small_map):
    """The convolution of a 2x2 map has true first and second derivatives."""
    torch.testing.assert_close(_conv_2x2(*small_map), _conv(*small_map))
    assert torch.autograd.gradcheck(_conv_2x2, small_map, fast_mode=True)
    assert torch.autograd.gradgradcheck(_conv_2x2, small_map, fast_mode=True)


def test_the_2x2_convolution_has_gradients_for_each_sample(small_map):
    """The convolution of a 2x2 map has gradients for each sample, as functorch takes them."""
    x, *parameters = (tensor.detach() for tensor in small_map)

    def loss(parameters, sample):
        return _conv_2x2(sample[None], *parameters).sin().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for index, sample in enumerate(x):
        expected = torch.func.grad(lambda p, s=sample: _conv(s[None], *p).sin().sum())(parameters)
        torch.testing.assert_close([whole[index] for whole in found], expected)


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.bfloat16), pytest.param("cuda", torch.float16, marks=pytest.mark.gpu)]
)
def test_the_convolution_of_a_2x2_map_follows_autocast(small_map, device, dtype):
    tensors = [tensor.detach().float().to(device).requires_grad_() for tensor in small_map]
    with torch.autocast(device, dtype):
        out = _conv_2x2(*tensors)
    assert out.dtype == dtype
    expected = torch.autograd.grad(_conv(*tensors).sum(), tensors)
    actual = torch.autograd.grad(out.float().sum(), tensors)
    assert {gradient.dtype for gradient in actual} == {torch.float32}
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=5e-2)


def test_the_default_network_has_the_size_of_the_paper():
    """The default network has the paper's 139 582 982 parameters, of which queries and keys are not trained."""
    with torch.device("meta"):
        model = HTNet(HTNetConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 139_582_982
    queries_and_keys = 2 * (2 * 255 * 256 + 2 * 510 * 512 + 10 * 1020 * 1024)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == 139_582_982 - queries_and_keys


def test_layers_start_as_the_convolutions_of_upstream():
    """Linear layers start as torch initialises the 1x1 convolutions of upstream."""
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


def test_biases_norms_and_positions_have_no_weight_decay():
    """The names without weight decay are those of parameters: biases, norms and position embeddings."""
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
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(model(x).sum(), trained)
    model.set_grad_checkpointing()
    actual = torch.autograd.grad(model(x).sum(), trained)
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
