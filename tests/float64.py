"""The model and its losses in NumPy's float64, from openpi's formulas and not from our code.

One joint attention over prefix and suffix under a mask, draw by draw and without a cache; every
shape of a student. Of the attention loss it has the paper's form: actions, head by head.
"""

import math
import types

import numpy as np

from shallow_pi.checkpoints import weights

LAYERS, ENCODER = "PaliGemma/llm/layers", "PaliGemma/img/Transformer/encoderblock"
PARTS = ("PaliGemma/img", "PaliGemma/llm/layers", "action_", "image_scorer")


def wide(tree):
    """The leaves of a tree by path, in float64."""
    return {path: np.asarray(leaf, np.float64) for path, leaf in weights.leaves(tree).items()}


def observed(model, observation):
    """An observation as the next functions take it."""
    return types.SimpleNamespace(
        images=np.stack([observation.images[c] for c in model.cameras], 1),
        cameras=np.stack([observation.image_masks[c] for c in model.cameras], 1),
        state=np.float64(observation.state),
        prompt=np.asarray(observation.tokenized_prompt),
        prompt_valid=np.asarray(observation.tokenized_prompt_mask),
    )


def check(spec, teacher, student, inputs, metrics, gradient):
    """Compare a step's losses, and its gradient along a random direction in each part of the model.

    Args:
      spec: of the step.
      teacher: parameters, as the next one.
      student: the parameters before the step.
      inputs: of `step.draw_inputs`.
      metrics: of the step.
      gradient: that it took.
    """
    known, own, slope = wide(teacher), wide(student), wide(gradient)
    seen = observed(spec.student, inputs.observation)
    targets = _targets(spec, known, seen, inputs)
    # The choice of tokens has no gradient, and what the scorer reads is constant.
    fixed = run(spec.student, own, seen, *_draw(inputs, 0))
    expected = losses(spec, own, seen, inputs, targets, fixed)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=1e-6, err_msg=name)
    generator = np.random.default_rng(0)
    for part in PARTS:
        paths = [path for path in own if path.startswith(part)]
        if not paths:
            continue
        way = {p: generator.standard_normal(own[p].shape) * (own[p] != 0) for p in paths}
        ends = []
        for sign in (1, -1):
            moved = own | {path: own[path] + sign * 1e-5 * way[path] for path in paths}
            ends.append(losses(spec, moved, seen, inputs, targets, fixed)["loss"])
        found = sum(np.sum(slope[path] * way[path]) for path in paths)
        size = math.sqrt(sum(np.sum(slope[path] ** 2) for path in paths))
        assert abs(found - (ends[0] - ends[1]) / 2e-5) < 2e-3 * size, part


def losses(spec, student, seen, inputs, targets, fixed):
    """All terms and their weighted sum."""
    model, switches = spec.student, spec.losses
    counts, draws = np.asarray(inputs.action_mask), inputs.t.shape[1]
    found = dict.fromkeys(("task_loss", "velocity_loss", "attention_loss"), 0.0)

    def add(name, values, r):
        found[name] = found.get(name, 0.0) + np.sum(values * counts[:, r]) / counts.sum()

    for r in range(draws):
        x_t, t = _draw(inputs, r)
        out, theirs = run(model, student, seen, x_t, t, fixed), targets.runs[r]
        add("task_loss", np.mean((out.v - np.float64(inputs.u[:, r])) ** 2, -1), r)
        add("velocity_loss", np.mean((out.v - theirs.v) ** 2, -1), r)
        pair = out.logits[targets.pair[0]], theirs.logits[targets.pair[1]]
        add("attention_loss", _divergence(model, *pair, out), r)
        if targets.ends:
            noise, s = np.float64(inputs.noise[:, r]), np.float64(inputs.line_t[:, r])
            z = s[:, None, None] * noise + (1 - s)[:, None, None] * targets.ends[r]
            v = run(model, student, seen, z, s, fixed).v
            add("reflow_loss", np.mean((v - (noise - targets.ends[r])) ** 2, -1), r)
    cameras = np.maximum(seen.cameras.sum(1), 1)
    if switches.vision:
        errors = np.mean((out.tokens - targets.runs[0].tokens) ** 2, axis=(2, 3))
        found["vision_loss"] = np.mean(np.sum(errors * seen.cameras, 1) / cameras)
    if switches.scorer:
        mass = targets.mass / targets.mass.sum(-1, keepdims=True).clip(1e-300)
        each = mass * (np.log(mass.clip(1e-300)) - np.log(softmax(out.scores)))
        found["scorer_loss"] = np.mean(np.sum(each.sum(-1) * seen.cameras, 1) / cameras)
        kept = np.take_along_axis(targets.mass, out.kept, 2).sum((1, 2))
        found["attention_kept"] = np.mean(kept / targets.mass.sum((1, 2)))
    weights_of = {f"{name}_loss": weight for name, weight in switches.weights.items()}
    total = sum(weights_of.get(name, 0.0) * value for name, value in found.items())
    return found | {"loss": total}


def _draw(inputs, r):
    return np.float64(inputs.x_t[:, r]), np.float64(inputs.t[:, r])


def _targets(spec, params, seen, inputs):
    """What the teacher gives: its runs, its ends, and its attention to each patch."""
    model, draws = spec.teacher, inputs.t.shape[1]
    runs = [run(model, params, seen, *_draw(inputs, r)) for r in range(draws)]
    ends = []
    if inputs.line_t is not None:
        for r in range(draws):
            x = np.float64(inputs.noise[:, r])
            for i in range(10):
                x = x - run(model, params, seen, x, np.full(len(x), 1 - i / 10)).v / 10
            ends.append(x)
    pair, (b, c) = spec.attention_layers, seen.cameras.shape
    mass = np.zeros((b, c, model.patches))
    for r in range(draws):
        logits = np.where(runs[r].valid[:, None, None], runs[r].logits[pair[1]], -np.inf)
        rows = softmax(logits).mean(1) * np.asarray(inputs.action_mask)[:, r, :, None]
        mass += rows.sum(1)[:, : c * model.patches].reshape(mass.shape)
    return types.SimpleNamespace(runs=runs, ends=ends, pair=pair, mass=mass)


def _divergence(model, own, theirs, out):
    """KL(teacher ‖ student) of every action, over the tokens that the student has."""
    images = len(model.cameras) * model.patches
    if model.scored_tokens:
        columns = out.columns[:, None, None]
        theirs = np.take_along_axis(theirs, np.broadcast_to(columns, own.shape), -1)
    elif model.pooled_tokens:
        cells = [
            np.log(np.exp(theirs[..., [k * model.patches + i for i in cell]]).sum(-1))
            for k in range(len(model.cameras))
            for cell in _cells(model)
        ]
        theirs = np.concatenate([np.stack(cells, -1), theirs[..., images:]], -1)
    there = out.valid[:, None, None]
    p, q = (softmax(np.where(there, x, -np.inf)) for x in (theirs, own))
    return np.sum(p * (np.log(p.clip(1e-300)) - np.log(q.clip(1e-300))), -1).mean(1)


def _cells(model):
    """The patches of each cell, row by row: cells as square as there are, wider than high."""
    side, best = model.grid, (0, 0)
    for high in range(1, side + 1):
        across = side**2 // model.image_tokens // high
        if side % high == 0 and high <= across <= side and side % across == 0:
            best = high, across
    high, across = best
    rows, columns = range(0, side, high), range(0, side, across)
    return [
        [y * side + x for y in range(r, r + high) for x in range(c, c + across)]
        for r in rows
        for c in columns
    ]


def run(model, params, seen, x_t, t, fixed=None):
    """The velocity of one draw, and what losses compare.

    Args:
      model: the config.
      params: of `wide`.
      seen: of `observed`.
      x_t: noisy actions.
      t: their times.
      fixed: a run whose choice of tokens is kept, and whose tokens the scorer reads.
    """
    b, c, width, head = len(x_t), len(model.cameras), model.backbone.width, model.backbone.head_dim
    n, patches, horizon = model.backbone.num_heads, model.patches, model.action_horizon
    tokens = tower(model, params, seen.images)
    prompt = params["PaliGemma/llm/embedder/input_embedding"][seen.prompt] * math.sqrt(width)
    out = types.SimpleNamespace(tokens=tokens, prompt=prompt, scores=None, kept=None, logits=[])
    valid = np.concatenate([np.repeat(seen.cameras, patches, 1), seen.prompt_valid], 1)
    places = np.cumsum(valid, 1) - 1
    if model.scored_tokens:
        out.scores = _scores(params, fixed or out, seen)
        best = np.argsort(-out.scores, axis=-1, kind="stable")[..., : model.scored_tokens]
        out.kept = fixed.kept if fixed else np.sort(best, -1)
        words = np.broadcast_to(c * patches + np.arange(prompt.shape[1]), (b, prompt.shape[1]))
        images = (out.kept + patches * np.arange(c)[:, None]).reshape(b, -1)
        out.columns = np.concatenate([images, words], 1)
        images = np.take_along_axis(tokens.reshape(b, -1, width), images[..., None], 1)
    else:
        images = np.stack([tokens[:, :, cell].mean(2) for cell in _cells(model)], 2)
        images = images.reshape(b, -1, width)
    prefix, end = np.concatenate([images, prompt], 1), valid.sum(1)
    if model.scored_tokens:
        valid, places = (np.take_along_axis(x, out.columns, 1) for x in (valid, places))
    else:
        seen_tokens = np.repeat(seen.cameras, model.image_tokens, 1)
        valid = np.concatenate([seen_tokens, seen.prompt_valid], 1)
        places, end = np.cumsum(valid, 1) - 1, valid.sum(1)
    out.valid = valid
    suffix, condition = _suffix(model, params, seen, x_t, t)
    s, total = prefix.shape[1], prefix.shape[1] + suffix.shape[1]
    # openpi's blocks: the prefix, π0's state, the actions.
    block = np.repeat([0, 1, 2], [s, suffix.shape[1] - horizon, horizon])
    exists = np.concatenate([valid, np.ones((b, suffix.shape[1]), bool)], 1)
    mask = (block[:, None] >= block[None])[None] & exists[:, None]
    at = places, end[:, None] + np.arange(suffix.shape[1])
    for i, kind in enumerate(model.layers):
        streams, parts, logits = [prefix, suffix], {}, None
        for e, half in enumerate(kind):
            if half == "absent":
                continue
            ending = "_1" * e
            name = f"{LAYERS}/attn/{{}}{ending}/w"
            normed, gate = _norm(params, f"{LAYERS}/pre_attention_norm{ending}", streams[e],
                                 condition if e else None, i)  # fmt: skip
            q = np.einsum("btd,ndh->btnh", normed, params[name.format("q_einsum")][i])
            k, v = np.einsum("btd,ckdh->cbtkh", normed, params[name.format("kv_einsum")][i])
            parts[e] = _rotate(q, at[e]) / math.sqrt(head), _rotate(k, at[e]), v, gate
        keys, values = (np.concatenate([p[j] for p in parts.values()], 1) for j in (1, 2))
        columns = np.concatenate([[range(s), range(s, total)][e] for e in parts]).astype(int)
        for e, half in enumerate(kind):
            if half != "whole":
                continue
            rows, ending = slice(s * e, total if e else s), "_1" * e
            grouped = parts[e][0].reshape(b, -1, keys.shape[2], n // keys.shape[2], head)
            found = np.einsum("btkgh,bskh->bkgts", grouped, keys)
            if e:
                logits = found.reshape(b, n, -1, len(columns))[:, :, -horizon:, :s]
            seen_by = mask[:, rows][:, :, columns][:, None, None]
            shares = softmax(np.where(seen_by, found, -1e30))
            mixed = np.einsum("bkgts,bskh->btkgh", shares, values).reshape(b, -1, n, head)
            added = np.einsum("btnh,nhd->btd", mixed,
                              params[f"{LAYERS}/attn/attn_vec_einsum{ending}/w"][i])  # fmt: skip
            x = streams[e] + parts[e][3] * added
            normed, gate = _norm(params, f"{LAYERS}/pre_ffw_norm{ending}", x,
                                 condition if e else None, i)  # fmt: skip
            up = params[f"{LAYERS}/mlp{ending}/gating_einsum"][i]
            hidden = _gelu(normed @ up[0]) * (normed @ up[1])
            streams[e] = x + gate * (hidden @ params[f"{LAYERS}/mlp{ending}/linear"][i])
        out.logits.append(logits)
        prefix, suffix = streams
    normed, _ = _norm(params, "PaliGemma/llm/final_norm_1", suffix, condition, ...)
    out.v = _dense(params, "action_out_proj", normed[:, -horizon:])
    return out


def tower(model, params, images):
    """The tokens of every patch, by camera."""
    image, side = model.image, model.grid
    b, c, *_ = images.shape
    size = image.patch_size
    cut = np.float64(images).reshape(b, c, side, size, side, size, 3).swapaxes(3, 4)
    kernel = params["PaliGemma/img/embedding/kernel"].reshape(-1, image.width)
    x = cut.reshape(b, c, side**2, -1) @ kernel + params["PaliGemma/img/embedding/bias"]
    x = x + params["PaliGemma/img/pos_embedding"]
    heads = f"{ENCODER}/MultiHeadDotProductAttention_0"
    for i in range(image.depth):
        y = _layer_norm(params, f"{ENCODER}/LayerNorm_0", x, i)
        q, k, v = (
            np.einsum("bctd,dnh->bctnh", y, params[f"{heads}/{name}/kernel"][i])
            + params[f"{heads}/{name}/bias"][i]
            for name in ("query", "key", "value")
        )
        shares = softmax(np.einsum("bctnh,bcsnh->bcnts", q, k) / math.sqrt(q.shape[-1]))
        mixed = np.einsum("bcnts,bcsnh->bctnh", shares, v)
        x = x + np.einsum("bctnh,nhd->bctd", mixed, params[f"{heads}/out/kernel"][i])
        x = x + params[f"{heads}/out/bias"][i]
        y = _layer_norm(params, f"{ENCODER}/LayerNorm_1", x, i)
        y = _gelu(_dense(params, f"{ENCODER}/MlpBlock_0/Dense_0", y, i))
        x = x + _dense(params, f"{ENCODER}/MlpBlock_0/Dense_1", y, i)
    x = _layer_norm(params, "PaliGemma/img/Transformer/encoder_norm", x)
    return _dense(params, "PaliGemma/img/head", x)


def _scores(params, read, seen):
    """The scores of every patch, from tokens and prompt of a run."""
    there = seen.prompt_valid[..., None]
    mean = np.sum(read.prompt * there, 1) / np.maximum(there.sum(1), 1)
    asked = _unit(mean) @ params["image_scorer/prompt/kernel"]
    hidden = _dense(params, "image_scorer/hidden", _unit(read.tokens)) + asked[:, None, None]
    scores = _gelu(hidden) @ params["image_scorer/score/kernel"]
    return scores[..., 0] + params["image_scorer/position"]


def _suffix(model, params, seen, x_t, t):
    """π0's state and the actions as tokens; π0.5's condition of the norms."""
    width, actions = model.expert.width, _dense(params, "action_in_proj", x_t)
    period = 4e-3 * 1000 ** np.linspace(0, 1, width // 2)
    angle = 2 * np.pi * t[:, None] / period
    time = np.concatenate([np.sin(angle), np.cos(angle)], -1)
    if model.pi05:
        hidden = _swish(_dense(params, "time_mlp_in", time))
        return actions, _swish(_dense(params, "time_mlp_out", hidden))
    both = np.concatenate([actions, np.broadcast_to(time[:, None], actions.shape)], -1)
    hidden = _swish(_dense(params, "action_time_mlp_in", both))
    state = _dense(params, "state_proj", seen.state)[:, None]
    return np.concatenate([state, _dense(params, "action_time_mlp_out", hidden)], 1), None


def softmax(x):
    """Over the last axis; of nothing it is 0."""
    largest = x.max(-1, keepdims=True)
    e = np.exp(x - np.where(np.isfinite(largest), largest, 0))
    return e / e.sum(-1, keepdims=True).clip(1e-300)


def _dense(params, path, x, i=...):
    return x @ params[f"{path}/kernel"][i] + params[f"{path}/bias"][i]


def _unit(x):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)


def _norm(params, path, x, condition, i):
    """RMSNorm and the gate of the residual, adaptive where there is a condition."""
    if condition is None:
        return _unit(x) * (1 + params[f"{path}/scale"][i]), 1.0
    scale, shift, gate = np.split(_dense(params, f"{path}/Dense_0", condition, i)[:, None], 3, -1)
    return _unit(x) * (1 + scale) + shift, gate


def _layer_norm(params, path, x, i=...):
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + 1e-6)
    return normed * params[f"{path}/scale"][i] + params[f"{path}/bias"][i]


def _rotate(x, places):
    half = x.shape[-1] // 2
    angle = (places[..., None] / 10_000 ** (np.arange(half) / half))[:, :, None]
    a, b = x[..., :half], x[..., half:]
    sin, cos = np.sin(angle), np.cos(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _swish(x):
    return x / (1 + np.exp(-x))
