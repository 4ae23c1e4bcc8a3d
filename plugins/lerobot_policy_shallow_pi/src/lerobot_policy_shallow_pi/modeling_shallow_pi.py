"""LeRobot's π0 and π0.5 at another depth, and a loader that checks every tensor.

LeRobot gets its sizes from `get_gemma_config` while it builds a model; meanwhile that function is
replaced by one with the config's depth. The action expert's output matrix (257152 × 1024), which no
policy uses, is left out. Loading first compares all names and shapes, and lists every difference.
"""

import contextlib
import pathlib
import types
from collections.abc import Iterator, Mapping
from typing import Any

import huggingface_hub
import safetensors.torch
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi05 import modeling_pi05

from lerobot_policy_shallow_pi import configuration_shallow_pi as configuration

FILE_NAME = "model.safetensors"
EMBEDDING = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
# The backbone's output matrix, tied to its embedding.
TIED = "model.paligemma_with_expert.paligemma.lm_head.weight"
UNUSED = "model.paligemma_with_expert.gemma_expert.lm_head.weight"
LAYERS = "model.paligemma_with_expert.paligemma.model.language_model.layers."


@contextlib.contextmanager
def _at_depth(module: types.ModuleType, depth: int) -> Iterator[None]:
    """Let `module` build its towers with this many layers."""
    original = module.get_gemma_config

    def shallow(variant: str) -> Any:
        sizes = original(variant)
        sizes.depth = depth
        return sizes

    module.get_gemma_config = shallow
    try:
        yield
    finally:
        module.get_gemma_config = original


class _Shallow:
    """The parts that both policies add to LeRobot's."""

    # LeRobot's module that builds the model.
    module: types.ModuleType

    def __init__(self, config: PreTrainedConfig, **kwargs: Any) -> None:
        if config.depth < 1:
            raise ValueError(
                f"depth must be at least 1, got {config.depth}: the config.json of an exported "
                'student has it; for a new policy give it ("depth": 6, or --policy.depth=6)'
            )
        with _at_depth(self.module, config.depth):
            super().__init__(config, **kwargs)
        with_expert = self.model.paligemma_with_expert
        with_expert.gemma_expert.lm_head = torch.nn.Identity()
        towers = (with_expert.paligemma.model.language_model, with_expert.gemma_expert.model)
        made = {len(tower.layers) for tower in towers}
        if made != {config.depth}:
            raise RuntimeError(
                f"LeRobot built {sorted(made)} layers, expected {config.depth}: this version of "
                "LeRobot does not take its sizes from get_gemma_config; use 0.6"
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | pathlib.Path,
        *,
        config: PreTrainedConfig | None = None,
        strict: bool = True,
        revision: str | None = None,
        cache_dir: str | pathlib.Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **kwargs: Any,
    ) -> "_Shallow":
        """The policy of a folder or of a repository on the Hugging Face hub, in evaluation mode.

        Raises:
          ValueError: a config of another type, or a file that does not fit it.
          FileNotFoundError: there is no `model.safetensors`.
        """
        if not strict:
            raise ValueError(f"{cls.__name__} loads a file whole or not at all: leave strict True")
        download = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
            "force_download": force_download,
        }
        if config is None:
            config = PreTrainedConfig.from_pretrained(pretrained_name_or_path, **download)
        if not isinstance(config, cls.config_class):
            raise ValueError(
                f"{pretrained_name_or_path} holds a policy of type {config.type!r}, and "
                f"{cls.__name__} loads {cls.name!r}: use the class of that type"
            )
        folder = pathlib.Path(pretrained_name_or_path)
        file = folder / FILE_NAME
        if not folder.is_dir():
            name = str(pretrained_name_or_path)
            file = pathlib.Path(huggingface_hub.hf_hub_download(name, FILE_NAME, **download))
        if not file.is_file():
            raise FileNotFoundError(f"there is no {FILE_NAME} in {folder}: export it again")
        policy = cls(config, **kwargs)
        tensors = safetensors.torch.load_file(file)
        tensors.pop(UNUSED, None)
        if EMBEDDING in tensors:
            tensors.setdefault(TIED, tensors[EMBEDDING])
        check(tensors, policy.state_dict(), f"{file} ({config.type}, depth {config.depth})")
        policy.load_state_dict(tensors, strict=True)
        policy.to(config.device)
        policy.eval()
        return policy


def check(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], what: str
) -> None:
    """Raise a ValueError that names every missing, unknown and misshapen tensor."""
    problems = [
        f"missing {name} {tuple(expected[name].shape)}" for name in expected.keys() - found.keys()
    ]
    problems += [
        f"unknown {name} {tuple(found[name].shape)}" for name in found.keys() - expected.keys()
    ]
    problems += [
        f"shape {name}: expected {tuple(expected[name].shape)}, found {tuple(found[name].shape)}"
        for name in found.keys() & expected.keys()
        if found[name].shape != expected[name].shape
    ]
    if not problems:
        return
    depths = [
        len(
            {
                name.removeprefix(LAYERS).partition(".")[0]
                for name in names
                if name.startswith(LAYERS)
            }
        )
        for names in (found, expected)
    ]
    hint = ""
    if depths[0] != depths[1]:
        hint = f"\nhint: the file has {depths[0]} layers and the config says {depths[1]}"
    raise ValueError(
        f"{what} does not hold the expected tensors ({len(problems)} differ):\n  "
        + "\n  ".join(sorted(problems))
        + hint
    )


class ShallowPi0Policy(_Shallow, modeling_pi0.PI0Policy):
    """π0 with the depth of its config."""

    config_class = configuration.ShallowPi0Config
    name = "shallow_pi0"
    module = modeling_pi0


class ShallowPi05Policy(_Shallow, modeling_pi05.PI05Policy):
    """π0.5 with the depth of its config."""

    config_class = configuration.ShallowPi05Config
    name = "shallow_pi05"
    module = modeling_pi05
