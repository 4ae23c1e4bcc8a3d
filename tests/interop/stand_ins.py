"""Empty modules for what openpi imports and its JAX side never uses, where it is not installed.

torch alone would be 2 GB. Only what is touched while openpi is imported is here; anything else is
an AttributeError that names it. Real packages are preferred.

python tests/interop/stand_ins.py [--all] SCRIPT [arguments]

runs a script that imports openpi; with --all, without torch, transformers and LeRobot even where
they are installed: they take long to import.
"""

import importlib.util
import runpy
import sys
import types

# Module → names of the empty classes in it.
MODULES: dict[str, tuple[str, ...]] = {
    "torch": ("Tensor", "uint8", "device"),
    "torch.nn": ("Module",),
    "torch.nn.functional": (),
    "torch.utils": (),
    "torch.utils.data": ("Dataset", "Sampler", "DataLoader"),
    "transformers": ("AutoProcessor",),
    "lerobot": (),
    "lerobot.common": (),
    "lerobot.common.datasets": (),
    "lerobot.common.datasets.lerobot_dataset": ("LeRobotDataset", "LeRobotDatasetMetadata"),
    "safetensors": (),
    "safetensors.torch": (),
}
# openpi's own module of PyTorch models; of no use without torch.
PYTORCH_MODEL = "openpi.models_pytorch.pi0_pytorch"


def install(every: bool = False) -> None:
    """Put a stand-in for every absent package into `sys.modules`; call it before openpi.

    Args:
      every: for those that are installed, too, but for safetensors, which others use.
    """
    absent = {
        root
        for root in {name.partition(".")[0] for name in MODULES}
        if root not in sys.modules
        and ((every and root != "safetensors") or importlib.util.find_spec(root) is None)
    }
    modules = {name: names for name, names in MODULES.items() if name.partition(".")[0] in absent}
    if "torch" in absent:
        modules[PYTORCH_MODEL] = ("PI0Pytorch",)
    for name, names in modules.items():
        module = types.ModuleType(name, "A stand-in of shallow_pi's tests; see stand_ins.py.")
        module.__path__ = []
        module.__spec__ = importlib.util.spec_from_loader(name, loader=None, is_package=True)
        for attribute in names:
            setattr(module, attribute, type(attribute, (), {}))
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent in modules:
            setattr(sys.modules[parent], child, module)


if __name__ == "__main__":
    install(every=sys.argv[1] == "--all")
    sys.argv = [word for word in sys.argv[1:] if word != "--all"]
    runpy.run_path(sys.argv[0], run_name="__main__")
