"""Every test sees eight virtual CPU devices, so that sharded code is always tested sharded.

Most of the time goes into compiling, so XLA is told to optimize little and to emit code the plain
way (a third of the time), and every program is kept in `.cache/jax` for the processes and runs
after it (delete the folder to start anew), but not by JAX 0.5, which hangs on programs for several
CPU devices that it reads back.
"""

# ruff: noqa: E402 (the variables come before JAX, which reads them when it is imported)
import contextlib
import dataclasses
import importlib.metadata
import os
import pathlib
import resource
import sys

CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"
JAX = tuple(map(int, importlib.metadata.version("jax").split(".")[:2]))
# As variables, so that the scripts the tests start see them too.
os.environ["XLA_FLAGS"] = "--xla_cpu_parallel_codegen_split_count=1"
if JAX < (0, 11):  # XLA aborts at a flag that it does not know any more.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
if JAX >= (0, 6):
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import numpy as np
import pytest

from shallow_pi import progress
from shallow_pi.data.lerobot import writer as lerobot_writer
from shallow_pi.data.robots import assets, normalize, robot, tokenizer
from shallow_pi.models import batch as batches
from shallow_pi.models import gemma, pi0, siglip
from shallow_pi.parallel import processes, shapes
from shallow_pi.training import command_line

TRAIN_CONFIGS = pathlib.Path(__file__).parents[1] / "train_configs"

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
processes.use_shardy()


@pytest.fixture(autouse=True)
def untold(monkeypatch):
    """Every test hears the warnings that an earlier one has heard."""
    monkeypatch.setattr(progress, "_told", set())
    monkeypatch.setattr(progress, "_strict", False)


@pytest.fixture(autouse=True, scope="module")
def programs():
    """Programs leave the memory after their module's tests: at the end they would take 12 GB."""
    yield
    jax.clear_caches()


@pytest.fixture
def small_disk():
    """Makes the system refuse to write files beyond a size, as a full disk does, in any thread."""

    @contextlib.contextmanager
    def limit(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture
def command(monkeypatch, capsys):
    """Calls a command's module as its script does: (exit status, stdout, stderr)."""

    def call(module, *arguments):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        status = 0
        try:
            module.main()
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def strict():
    """Pure modules must not rely on rank or dtype promotion."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def offloads():
    """True if CPU devices have a separate host memory, which JAX 0.5.3's lack."""
    kinds = [memory.kind for memory in jax.devices()[0].addressable_memories()]
    return shapes.HOST_MEMORY in kinds


@pytest.fixture(scope="session")
def tiny_config():
    """Makes π0 (or π0.5) in miniature: grouped queries, no two sizes equal, float32."""

    def make(**changes):
        sizes = {
            "depth": 3,
            "backbone": gemma.GemmaConfig(
                width=24, mlp_dim=40, num_heads=4, num_kv_heads=2, head_dim=8
            ),
            "expert": gemma.GemmaConfig(
                width=16, mlp_dim=28, num_heads=4, num_kv_heads=2, head_dim=8
            ),
            "image": siglip.SiglipConfig(width=20, depth=1, mlp_dim=36, num_heads=2, patch_size=12),
            "image_size": 24,
            "vocab_size": 32,
            "cameras": ("base_0_rgb", "left_wrist_0_rgb"),
            "action_dim": 6,
            "action_horizon": 5,
            "max_token_len": 7,
            "dtype": "float32",
        }
        return pi0.Pi0Config(**(sizes | changes))

    return make


@pytest.fixture(scope="session")
def tiny_params():
    """Makes parameters no leaf of which is zero, unlike a fresh model's norms and biases."""

    def make(config, seed=0, dtype=None):
        generator = np.random.default_rng(seed)
        return jax.tree.map(
            # Made by NumPy: JAX would compile a conversion for every shape.
            lambda leaf: jax.device_put(
                (0.2 * generator.standard_normal(leaf.shape)).astype(dtype or leaf.dtype)
            ),
            pi0.abstract_params(config),
        )

    return make


@pytest.fixture(scope="session")
def tiny_batch():
    """Makes a batch of the loader; camera 1 of sample 0 is absent, prompts end in padding."""

    def make(config, b=2, seed=0):
        batch, prompt = batches.noise(config, b, seed), config.max_token_len
        batch.observation.image_masks[config.cameras[-1]][0] = False
        used = np.arange(prompt) < prompt - 2 + np.arange(b)[:, None] % 3
        return batch.replace(observation=batch.observation.replace(tokenized_prompt_mask=used))

    return make


@pytest.fixture(scope="session")
def tiny_observation(tiny_batch):
    """Makes the observation of such a batch, on device."""

    def make(config, b=2, seed=0):
        observation = tiny_batch(config, b, seed).observation
        return jax.tree.map(jax.numpy.asarray, observation).as_float()

    return make


@pytest.fixture(scope="session")
def tiny_experiment():
    """Makes the config `debug` still smaller: three layers to two in float32, four steps."""

    def make(folder, **changes):
        debug = command_line.load(TRAIN_CONFIGS, "debug")
        model = dataclasses.replace(debug.model, depth=3, vocab_size=320, dtype="float32")
        fields = {
            "model": model,
            "batch_size": 8,
            "remat": "none",
            "ema_decay": 0.5,
            "num_train_steps": 4,
            "save_interval": 2,
            "log_interval": 1,
            "gradient_interval": 0,
            "tensorboard": False,
            "checkpoint_dir": str(folder),
        }
        return dataclasses.replace(debug, **(fields | changes))

    return make


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory):
    """Three short episodes of a turntable in LeRobot's format, and a tokenizer of their prompts."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    prompts = ["touch the red block", "touch the blue block"]
    with lerobot_writer.Writer(folder / "dataset", 20) as writer:
        for episode, length in enumerate((9, 7, 8)):
            pixels = generator.integers(0, 256, (2, length, 24, 24, 3), np.uint8)
            state, action = generator.standard_normal((2, length, 3)).astype(np.float32)
            images = {"base": pixels[0], "wrist": pixels[1]}
            writer.add_episode(images, state, action, prompts[episode % 2])
    tokenizer.train(prompts, folder / "tokenizer.model", vocab_size=320)
    return folder / "dataset", folder / "tokenizer.model"


@pytest.fixture(scope="module")
def own(tiny_config, tiny_dataset):
    """A small policy's assets."""
    ramp = np.linspace(0.5, 2, 3)
    stats = normalize.NormStats(mean=ramp, std=ramp + 1, q01=-ramp, q99=ramp)
    model = tiny_config(depth=2, vocab_size=320)
    both = {"state": stats, "actions": stats}
    return assets.Assets(model, robot.TURNTABLE, tiny_dataset[1], both, "turntable")


@pytest.fixture(scope="module")
def params(own, tiny_params):
    """Its parameters."""
    return tiny_params(own.model)
