"""With random weights in torch-fidelity's own architecture: its pixels, its features, and the libraries' numbers."""

import numpy as np
import pytest
import torch
from torch_fidelity import feature_extractor_inceptionv3 as fidelity

from quest.metrics.inception import SPATIAL_CHANNELS, Inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file as torch-fidelity's: random weights of a size that keeps activations from dying out."""
    patch = pytest.MonkeyPatch()
    patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
    patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
    torch.manual_seed(0)
    network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    patch.undo()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, size=(3, 3, 8, 8), dtype=np.uint8)
    return torch.from_numpy(smooth).repeat_interleave(8, 2).repeat_interleave(8, 3)  # [3, 3, 64, 64]


@pytest.fixture(scope="module")
def outputs(weights, images):
    return {protocol: Inception(weights, protocol)(images) for protocol in ("adm", "clean")}


def test_pool_and_logits_are_torch_fidelitys(weights, images, outputs):
    names = ["2048", "logits_unbiased", "logits"]
    network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", names, str(weights))
    pool, unbiased, biased = network(images)
    ours = outputs["adm"]
    assert pool.std() > 0.01 and (pool[0] - pool[1]).abs().max() > 0.01  # the random network says something
    assert torch.equal(ours["pool"], pool)
    torch.testing.assert_close(ours["logits"], unbiased, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(ours["logits"], biased, rtol=1e-4)


def test_spatial_is_the_first_channels_of_the_block_mixed_6d(weights, images, outputs):
    network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights))
    block = []
    network.Mixed_6d.register_forward_hook(lambda module, args, output: block.append(output))
    network(images)
    assert outputs["adm"]["spatial"].shape == (3, 2023)
    assert torch.equal(outputs["adm"]["spatial"], block[0][:, :SPATIAL_CHANNELS].flatten(1))


def test_clean_resizes_as_clean_fid_does(weights, images, outputs):
    from cleanfid.resize import build_resizer

    resized = np.stack([build_resizer("clean")(image) for image in images.permute(0, 2, 3, 1).numpy()])
    ours = Inception(weights, "clean").resize(images).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(ours, resized) and resized.dtype == np.float32
    # Another resize, other features: this is why a row names its protocol.
    difference = (outputs["clean"]["pool"] - outputs["adm"]["pool"]).abs().max()
    assert difference > 1e-3 * outputs["adm"]["pool"].abs().max()


def test_a_pickle_with_code_in_it_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"fc.weight": Code()}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="code.pth: not a file of tensors"):
        Inception(tmp_path / "code.pth", "adm")
    assert not (tmp_path / "ran").exists()


def test_bad_input(weights, tmp_path):
    with pytest.raises(ValueError, match="protocol: 'pytorch-fid' is not one of adm, torch-fidelity, clean"):
        Inception(weights, "pytorch-fid")
    (tmp_path / "short.pth").write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match="short.pth: not a file of tensors"):
        Inception(tmp_path / "short.pth", "adm")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth: not the weights .*, lacks Mixed_6d"):
        Inception(tmp_path / "other.pth", "adm")
