"""The plugin's policies in miniature: they have the config's depth and check every tensor.

Needs LeRobot 0.6 with torch and transformers, so .ci/run does not run it:
pip install plugins/lerobot_policy_shallow_pi pytest && pytest plugins/lerobot_policy_shallow_pi
"""

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

import lerobot_policy_shallow_pi  # noqa: E402
import safetensors.torch  # noqa: E402 (after it is sure that torch is here)
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig  # noqa: E402
from lerobot.policies import factory  # noqa: E402
from lerobot.policies.pi0 import modeling_pi0  # noqa: E402
from lerobot.policies.pi05 import modeling_pi05  # noqa: E402
from lerobot_policy_shallow_pi import modeling_shallow_pi  # noqa: E402
from transformers.models.paligemma import modeling_paligemma  # noqa: E402

CONFIGS = {
    "shallow_pi0": lerobot_policy_shallow_pi.ShallowPi0Config,
    "shallow_pi05": lerobot_policy_shallow_pi.ShallowPi05Config,
}


class Projector(torch.nn.Module):
    """transformers' takes its width from a number LeRobot sets to 2048."""

    def __init__(self, config):
        super().__init__()
        self.linear = torch.nn.Linear(
            config.vision_config.hidden_size, config.text_config.hidden_size
        )

    def forward(self, x):
        return self.linear(x)


class Small:
    """transformers' table of configs with a small image encoder."""

    def __init__(self, table):
        self.table = table

    def __getitem__(self, key):
        if key != "paligemma":
            return self.table[key]

        def make():
            config = self.table[key]()
            images = config.vision_config
            images.hidden_size, images.num_hidden_layers, images.num_attention_heads = 16, 1, 2
            return config

        return make


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Sizes LeRobot has built in, in miniature; the depth it would take is 18."""
    monkeypatch.setattr(modeling_paligemma, "PaliGemmaMultiModalProjector", Projector)
    for module in (modeling_pi0, modeling_pi05):

        def sizes(variant, module=module):
            width = 16 if variant == "gemma_2b" else 8
            return module.GemmaConfig(width, 18, 12, num_heads=8, num_kv_heads=1, head_dim=4)

        monkeypatch.setattr(module, "get_gemma_config", sizes)
        monkeypatch.setattr(module, "CONFIG_MAPPING", Small(module.CONFIG_MAPPING))


@pytest.fixture(params=sorted(CONFIGS))
def saved(request, tmp_path):
    """A folder with a policy of three layers, and its tensors."""
    config = CONFIGS[request.param](
        depth=3,
        device="cpu",
        chunk_size=4,
        n_action_steps=4,
        input_features={
            "observation.images.base": PolicyFeature(FeatureType.VISUAL, (3, 224, 224)),
            "observation.state": PolicyFeature(FeatureType.STATE, (3,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (3,))},
    )
    policy = factory.get_policy_class(request.param)(config)
    tensors = {name: torch.randn_like(x) for name, x in policy.state_dict().items()}
    del tensors[modeling_shallow_pi.TIED]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    config.save_pretrained(tmp_path)
    return tmp_path, tensors


def _load(folder):
    config = PreTrainedConfig.from_pretrained(folder)
    return factory.get_policy_class(config.type).from_pretrained(folder, config=config)


def _configure(folder, **changes):
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(content))


def test_a_folder_is_loaded_whole_at_its_depth(saved):
    folder, tensors = saved
    policy = _load(folder)
    state = policy.state_dict()
    assert len(policy.model.paligemma_with_expert.gemma_expert.model.layers) == 3
    assert set(state) == {*tensors, modeling_shallow_pi.TIED}
    for name, tensor in tensors.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0)
    batch = {
        "observation.images.base": torch.rand(1, 3, 224, 224),
        "observation.state": torch.zeros(1, 3),
        "observation.language.tokens": torch.ones(1, 5, dtype=torch.long),
        "observation.language.attention_mask": torch.ones(1, 5, dtype=torch.bool),
    }
    assert policy.predict_action_chunk(batch).shape == (1, 4, 3)


def test_another_depth_raises_and_says_so(saved):
    folder, _ = saved
    _configure(folder, depth=18)
    with pytest.raises(ValueError, match=r"(?s)missing .*the file has 3 layers and the config sa"):
        _load(folder)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_a_wrong_tensor_raises_and_is_named(saved, change):
    folder, tensors = saved
    name = "model.action_in_proj.bias"
    if change == "missing":
        del tensors[name]
    if change == "unknown":
        tensors["model.other.bias"] = torch.zeros(5)
    if change == "shape":
        tensors[name] = torch.zeros(5)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    wrong = {"unknown": "model.other.bias"}.get(change, name)
    with pytest.raises(ValueError, match=rf"{change} {wrong}"):
        _load(folder)


def test_the_depth_lerobot_builds_is_its_own_again_afterwards(saved):
    assert modeling_pi0.get_gemma_config("gemma_2b").depth == 18
    assert modeling_pi05.get_gemma_config("gemma_2b").depth == 18


def test_a_config_without_a_depth_raises(saved):
    folder, _ = saved
    _configure(folder, depth=0)
    with pytest.raises(ValueError, match="depth must be at least 1"):
        _load(folder)


def test_a_folder_of_another_type_raises(saved):
    folder, _ = saved
    config = PreTrainedConfig.from_pretrained(folder)
    other = {"shallow_pi0": "shallow_pi05", "shallow_pi05": "shallow_pi0"}[config.type]
    with pytest.raises(ValueError, match=rf"type '{config.type}', and .* loads '{other}'"):
        factory.get_policy_class(other).from_pretrained(folder)


def test_a_folder_without_a_file_raises(saved):
    folder, _ = saved
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        _load(folder)
