"""The fields of a config that its other fields leave without effect.

A command line that sets one of them is warned of, or refused where two fields say different
things. The file of a config may set them: another field may give them effect again.
"""

from shallow_pi import flags
from shallow_pi.training import config


def conflicts(experiment: config.DistillConfig) -> flags.Idle:
    """Fields that contradict others, with what to do."""
    student, teacher, task = experiment.student, experiment.teacher, experiment.closed_loop
    own = ("tasks", "num_blocks", "num_cups", "clearance_mm", "disc_speed_deg", "harder")
    usual = [name for name in own if task and getattr(task, name) == getattr(type(task), name)]
    layers, depths = student.layers, (student.backbone_depth, student.expert_depth)
    return [
        (
            layers and student.depth != len(layers),
            "student.depth",
            f"--student.layers {' '.join(map(str, layers))} keeps {len(layers)}; give only one",
        ),
        (
            not layers and all(depths) and student.depth not in depths,
            "student.depth",
            f"--student.backbone-depth {depths[0]} and --student.expert-depth {depths[1]} set the "
            "layers of both streams; leave it out, or one of them",
        ),
        (
            teacher is not None and teacher.train,
            "teacher.path",
            "--teacher.train trains the teacher instead of reading it; give only one",
        ),
        (
            task is not None and task.sim != "turntable",
            " ".join(f"closed_loop.{name}" for name in usual),
            "the turntable's default, which stands for the simulator's own; give --closed-loop."
            "options NAME=VALUE",
        ),
    ]


def fields(experiment: config.DistillConfig) -> flags.Idle:
    """Fields without effect, with the reason and what to do."""
    student, losses, data = experiment.student, experiment.losses, experiment.data
    teacher, task = experiment.teacher, experiment.closed_loop
    layers = student.layers
    compares = losses.attention or losses.scorer or student.image_token_choice == "scored"
    return [
        (
            layers or student.strategy != "random",
            "student.layer_seed",
            "only --student.strategy random without --student.layers draws layers",
        ),
        (
            not student.image_tokens,
            "student.image_token_choice",
            "all image tokens are kept; give --student.image-tokens",
        ),
        (
            teacher is None,
            "student.init student.layer_seed",
            "there is no teacher to cut the student out of; leave it out",
        ),
        (
            teacher is not None and not teacher.train,
            "teacher.config",
            "the teacher is read from --teacher.path; give --teacher.train to train it",
        ),
        (
            not losses.reflow,
            "losses.reflow_deployed",
            "the reflow loss is off; give --losses.reflow",
        ),
        (
            not losses.attention,
            "losses.attention_heads",
            "the attention loss is off; give --losses.attention",
        ),
        (
            not compares,
            "losses.attention_queries losses.attention_layer",
            "no attention is compared; give --losses.attention",
        ),
        (
            data.source == "synthetic",
            "data.path data.more data.weights data.episodes data.exclude_episodes data.robot "
            "data.skip_bad_episodes data.tokenizer data.norm_stats data.asset_id data.cache "
            "data.cache_dir data.cache_gib",
            "--data.source synthetic reads no dataset; give --data.source lerobot",
        ),
        (
            data.cache == "none",
            "data.cache_gib",
            "nothing is cached; give --data.cache memory or disk",
        ),
        (
            data.cache != "disk",
            "data.cache_dir",
            f"--data.cache {data.cache} has no folder; give --data.cache disk",
        ),
        (
            data.num_workers,
            "data.num_threads",
            f"--data.num-workers {data.num_workers} processes read instead; give only one",
        ),
        (
            not experiment.validation.interval,
            "validation.samples validation.num_steps validation.against",
            "validation is off; give --validation.interval",
        ),
        (
            not data.held_out and ":" not in data.source,
            "validation.interval validation.samples validation.num_steps validation.against",
            "there is nothing to validate on; give --data.held-out",
        ),
        (
            data.path,
            "closed_loop.demonstrations closed_loop.demonstrated closed_loop.noise "
            "closed_loop.seed",
            f"the data are those of --data.path {data.path}; give only one",
        ),
        (
            teacher is None and task is not None,
            "closed_loop.baselines",
            "there is no teacher, and a student's baselines alone are trained; leave it out",
        ),
    ]
