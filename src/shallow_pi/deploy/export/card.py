"""The README.md of an exported policy: facts, checks and instructions."""

import textwrap
from collections.abc import Sequence

from shallow_pi.deploy import facts
from shallow_pi.deploy.export import student as students

_OURS = """\
With shallow_pi itself (installed from its wheel or a clone), whatever the format:

    shallow-pi serve --policy.dir /path/to/{folder}

or in Python `shallow_pi.deploy.policy.Policy.from_checkpoint("/path/to/{folder}")`.

"""


def text(
    usage: str,
    folder: str,
    student: students.Student,
    origin: students.Origin,
    checked: str,
    *,
    is_policy: bool,
    other_sizes: Sequence[str] = (),
) -> str:
    """The card.

    Args:
      usage: how to run it in its format.
      folder: name of the exported folder.
      student: the student before conversion to the format.
      origin: its run, as far as known.
      checked: the check that was made, and the difference of its actions from the student's.
      is_policy: true if `Policy.from_checkpoint` reads the folder.
      other_sizes: what no released class of the format has.
    """
    model, robot, assets = student.model, student.assets.robot, student.assets
    chosen = " ".join(map(str, origin.layer_map))
    layers = model.depths + (" in\nbackbone and action expert alike" if model.is_even else "")
    if chosen:
        layers += f" (teacher layers {chosen} of {origin.teacher_depth})"
    rows = {
        "teacher": origin.teacher,
        "dataset": ", ".join(origin.datasets),
        "training": f"{origin.step} of {origin.steps} steps" if origin.steps else "",
        "held-out error": _error(origin),
        "robot": f"{robot.name}: {robot.state_dim} state and {robot.action_dim} action dimensions, "
        f"{robot.fps:g} Hz" + f" ({robot.taken})" * bool(robot.taken),
        "cameras": f"{', '.join(assets.seen.cameras)}, {model.image_size} × {model.image_size}",
        "image tower": f"{model.image.depth} layers, {facts.image_tokens(model)}",
        "actions": f"{model.action_horizon} a chunk, model dimension {model.action_dim}",
        "integration steps": f"{assets.num_steps if is_policy else student.num_steps}",
        "prompt": f"{model.max_token_len} tokens"
        + (", with the state in it" if model.discrete_state_input else ""),
        "still state dimensions": assets.still or "none",
        "normalization": f"{assets.kind.replace('_', '-')}, statistics `{assets.asset_id}`",
        "compute": model.dtype
        + f", trained for products in 8 bits ({assets.quantize})" * (assets.quantize != "none"),
    }
    table = "\n".join(f"| {name} | {value or 'not recorded'} |" for name, value in rows.items())
    return f"""\
---
pipeline_tag: robotics
tags: [robotics, vision-language-action, shallow_pi, {"pi05" if model.pi05 else "pi0"}]
---

# {model.kind} with {model.depths}

A policy of shallow_pi{f" (config {origin.name})" if origin.name else ""}: {layers}.

| | |
|---|---|
{table}

## Run it

{_sizes(other_sizes)}{usage}
{_OURS.format(folder=folder) if is_policy and not robot.elsewhere else ""}## Checked

{textwrap.fill(checked, 100, break_long_words=False, break_on_hyphens=False)}

Weights that descend from openpi's contain PaliGemma's, to which Google's Gemma terms of use apply.
"""


def _sizes(different: Sequence[str]) -> str:
    if not different:
        return ""
    return (
        "**No released openpi or LeRobot loads this** (exported with `--any-size`): "
        f"{'; '.join(different)}. Change their classes first.\n\n"
    )


def _error(origin: students.Origin) -> str:
    if origin.error is None:
        return ""
    than = {"data": "the recorded actions", "teacher": "the teacher's actions"}
    return f"{origin.error:.4g} (sampled against {than.get(origin.against, 'the reference')})"
