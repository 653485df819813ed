"""How well a superposition of bound pairs can be read back, and what training and the encoder leave of it.

    python -m benchmarks.unbinding                                        # random vectors, against the capacity law
    python -m benchmarks.unbinding --checkpoints A.pth B.pth --data_path dataset   # also trained models

**Random vectors.** ``n`` pairs of a random key and one of 1,000 random values are bound and added; each key is then
unbound, and the nearest of the 1,000 values is what was found. The law beside it is that of a noisy match against m
values: the right one scores N(1, σ²), each wrong one N(0, τ²), and it is found with the probability
``∫ φ((x-1)/σ)/σ · Φ(x/τ)^(m-1) dx``. Every pair adds 1/d to both variances; with unitary keys the right pair gives no
noise to itself (σ² = (n-1)/d, τ² = n/d; Frady, Kleyko & Sommer 2018 for such codes), with random ones the inverse is
approximate (Plate 1995): the spectrum of a key times its conjugate is 1 in the mean, with variance 1, and so is that of
a value, which makes σ² = (n+2)/d and leaves τ² = (n+1)/d.

**A model.** Of every item of a data set: the attributes' values that unbinding its vector with each key gives, right if
the first is one that the item has. Of a history, k events after one: the item and the values of that event, read from
the state of the scan of the encoder's first layer by the linear map to the bound vector that fits best on half of the
users, then unbound; measured on the other half. (The layer also keeps the last three inputs of its convolution, from
which these three are read without a mistake.) An attribute's *prior* is how often its commonest value would be right.
The models of ml-100k are those of ``python run_recbole_holo.py --dataset=ml-100k --seed=1 --binding=FORM
--binding_scale=ortho --bind_output=False (or True) --item_attributes="['class','release_year']"
[--binding_algebra=unitary]``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import integrate, stats
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from benchmarks.cells import RESULTS, headline
from recbole_holo.layers.carried import Carried
from recbole_holo.ops import bind, cleanup, unbind, unitary

WIDTHS = (32, 64, 128, 256, 512, 1024)
PAIRS = (1, 2, 4, 8, 16, 32, 64)
ALGEBRAS = ("none", "unitary")
VALUES, READINGS = 1000, 4096
BEHIND = (0, 1, 2, 3, 5, 10, 20)  # events after the one that is read
LEAD, APART, MOST = 10, 5, 8000  # events before the earliest that is read, events between histories, histories


# ---------------------------------------------------------------------- random vectors
def random_accuracy(d: int, n: int, algebra: str, generator: torch.Generator) -> float:
    """Part of the values that are found in superpositions of ``n`` pairs."""

    def draw(*shape: int) -> Tensor:
        x = torch.randn(*shape, d, generator=generator)
        return unitary(x, "ortho") if algebra == "unitary" else x

    found, values = [], draw(VALUES)
    for _ in range(-(-READINGS // n // 64)):
        keys, chosen = draw(64, n), torch.randint(VALUES, (64, n), generator=generator)
        pile = bind(keys, values[chosen], "ortho").sum(1, keepdim=True)
        guesses = cleanup(unbind(pile, keys, "ortho"), values)[1][..., 0]
        found.append((guesses == chosen).double().mean().item())
    return float(np.mean(found))


def law(d: int, n: int, algebra: str, m: int = VALUES) -> float:
    """The probability of the head of this module."""
    right, wrong = (n - 1, n) if algebra == "unitary" else (n + 2, n + 1)
    sigma, tau = (max(right, 1e-9) / d) ** 0.5, (wrong / d) ** 0.5
    points = np.linspace(-8, 8, 4001)  # of the right one's deviation, in σ
    density = stats.norm.pdf(points) * stats.norm.cdf((1 + sigma * points) / tau) ** (m - 1)
    return float(integrate.trapezoid(density, points))


def random_cells(seed: int) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    for algebra in ALGEBRAS:
        for d in tqdm(WIDTHS, desc=algebra):
            for n in PAIRS:
                accuracy = random_accuracy(d, n, algebra, generator)
                yield {"algebra": algebra, "d": d, "pairs": n, "accuracy": accuracy, "law": law(d, n, algebra)}


# ---------------------------------------------------------------------- models
@torch.no_grad()
def of_items(model: Any) -> dict[str, dict[str, float]]:
    """Attribute → how often the value that an item's vector gives is one it has, and how often the commonest is."""
    binding, items = model.binding, torch.arange(1, model.n_items)
    own = model.item_embedding.weight[1:]
    return of_vectors(binding, model.embed_items(items), own, items)


def of_vectors(binding: Any, vectors: Tensor, own: Tensor, items: Tensor) -> dict[str, dict[str, float]]:
    found, keys = {}, binding.keys(own)
    for m, (attribute, values) in enumerate(zip(binding.attributes, binding.roles_and_values()[1], strict=True)):
        held = attribute.index[items].reshape(len(items), -1)
        some = held.gt(0).any(-1)
        guess = cleanup(unbind(vectors[some], keys[some, m], binding.scale), values[1:])[1] + 1
        counts = torch.bincount(held[some].flatten(), minlength=len(values)).double()
        counts[0] = 0
        found[attribute.name] = {
            "accuracy": (held[some] == guess).any(-1).double().mean().item(),
            "prior": (counts.max() / some.sum()).item(),
            "values": len(values) - 1,
        }
    return found


@torch.no_grad()
def of_states(model: Any, histories: Tensor, to_fit: Tensor) -> dict[int, dict[str, float]]:
    """Events behind → how often an event is read from the first layer's state: its item, and its attributes' values.

    Args:
        histories: ``[B, L]``, of full length.
        to_fit: which of them the map is fitted on ``[B]``; the others are read.
    """
    states = []
    for part in histories.split(512):
        carried = Carried()
        model.hidden_states(part, carried)
        states.append(next(iter(carried.states.values()))[-1].flatten(1).double())
    state = torch.cat(states)
    mean, spread = state[to_fit].mean(0), state[to_fit].std(0) + 1e-9
    x = F.pad((state - mean) / spread, (0, 1), value=1.0)
    ridge = 10.0 * torch.eye(x.shape[1], dtype=torch.double)
    every, solved = model.embed_items(torch.arange(1, model.n_items)), {}
    inverse = torch.linalg.inv(x[to_fit].T @ x[to_fit] + ridge) @ x[to_fit].T
    for behind in BEHIND:
        event = histories[:, -1 - behind]
        read = (x[~to_fit] @ (inverse @ model.embed_items(event[to_fit]).double())).float()
        guess = cleanup(read, every)[1][:, 0] + 1
        solved[behind] = {"item": (guess == event[~to_fit]).double().mean().item()}
        values = of_vectors(model.binding, read, model.item_embedding.weight[guess], event[~to_fit])
        solved[behind].update({name: cell["accuracy"] for name, cell in values.items()})
    return solved


def cut_histories(model: Any, dataset: Any) -> tuple[Tensor, Tensor]:
    """Histories of one length from the training windows, and their users."""
    length, histories, users = max(BEHIND) + LEAD, [], []
    rows = dataset[:]
    for end in range(length, rows[model.ITEM_SEQ].shape[1] + 1, APART):
        long_enough = rows[model.ITEM_SEQ_LEN] >= end
        histories.append(rows[model.ITEM_SEQ][long_enough, end - length : end])
        users.append(rows[model.USER_ID][long_enough])
    chosen = torch.randperm(sum(map(len, users)), generator=torch.Generator().manual_seed(0))[:MOST]
    return torch.cat(histories)[chosen], torch.cat(users)[chosen]


def model_cells(path: str, data_path: str) -> dict[str, Any]:
    """What one checkpoint's model gives, and the same model before training."""
    from recbole_holo.quick_start import load_data_and_model

    config, model, _, train, *_ = load_data_and_model(path, data_path=data_path, state="ERROR", use_gpu=False)
    torch.manual_seed(config["seed"])
    fresh = type(model)(config, train.dataset).eval()
    histories, users = cut_histories(model, train.dataset)
    titles = {"model": config["model"], "dataset": config["dataset"], "form": model.binding.form}
    titles |= {"algebra": model.binding.algebra, "d": config["hidden_size"], "histories": len(histories)}
    titles |= {"bind_output": config["bind_output"] or False, "seed": config["seed"]}
    named = {"before training": fresh, "after training": model}
    return titles | {
        "items": {when: of_items(one) for when, one in named.items()},
        "states": {when: of_states(one, histories, users % 2 == 0) for when, one in named.items()},
    }


# ---------------------------------------------------------------------- pages
def render(cells: list[dict[str, Any]], models: list[dict[str, Any]]) -> str:
    lines = []
    for algebra in ALGEBRAS:
        rows = [
            [d, *(f"{c['accuracy']:.3f} ({c['law']:.3f})" for c in cells if (c["algebra"], c["d"]) == (algebra, d))]
            for d in WIDTHS
        ]
        head = ["d \\ pairs", *PAIRS]
        lines += [f"**Algebra {algebra}: found, and in brackets the law**", ""]
        lines += [tabulate(rows, headers=head, tablefmt="github", disable_numparse=True), ""]
    for one in models:
        name = f"{one['model']} on {one['dataset']}, d {one['d']}, binding {one['form']}, algebra {one['algebra']}"
        name += f", bind_output {one['bind_output']}, seed {one['seed']}"
        first = one["items"]["after training"]
        head = ["", *(f"{a} ({c['values']} values, prior {c['prior']:.3f})" for a, c in first.items())]
        rows = [[when, *(f"{c['accuracy']:.3f}" for c in found.values())] for when, found in one["items"].items()]
        lines += [f"**{name}: values read from items' vectors**", ""]
        lines += [tabulate(rows, headers=head, tablefmt="github", disable_numparse=True), ""]
        lines += [f"**{name}: read from the scan of the first layer, {one['histories']:,} histories**", ""]
        head = ["events after it", *(f"{what}, {when}" for when in one["states"] for what in ("item", *first))]
        rows = [
            [k, *(f"{one['states'][when][k][what]:.3f}" for when in one["states"] for what in ("item", *first))]
            for k in BEHIND
        ]
        lines += [tabulate(rows, headers=head, tablefmt="github", disable_numparse=True), ""]
    return "\n".join(lines)


def plot(cells: list[dict[str, Any]], target: Path) -> None:
    """Accuracy against the number of pairs, one line a width, the law dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for axis, algebra in zip(axes, ALGEBRAS, strict=True):
        for d in WIDTHS:
            mine = [c for c in cells if (c["algebra"], c["d"]) == (algebra, d)]
            (line,) = axis.plot(PAIRS, [c["accuracy"] for c in mine], marker="o", label=f"d {d}")
            axis.plot(PAIRS, [c["law"] for c in mine], linestyle="--", color=line.get_color())
        axis.set(xscale="log", title=f"algebra {algebra}", xlabel="pairs in the superposition")
        axis.set_xticks(PAIRS, [str(n) for n in PAIRS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"values found among {VALUES:,}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(target, dpi=110)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--checkpoints", nargs="*", default=[], help="trained models with a binding")
    options.add_argument("--data_path", default="dataset", help="folder of their data sets")
    options.add_argument("--seed", type=int, default=1)
    chosen = options.parse_args()
    kept = RESULTS / "cells" / "unbinding"
    kept.mkdir(parents=True, exist_ok=True)
    for path in chosen.checkpoints:
        cell = model_cells(path, chosen.data_path) | {"machine": headline("cpu", torch.get_num_threads())}
        name = "-".join(str(cell[key]) for key in ("model", "dataset", "form", "algebra", "bind_output", "d"))
        (kept / f"{name}.json").write_text(json.dumps(cell, indent=1) + "\n")
    cells = list(random_cells(chosen.seed))
    models = [json.loads(path.read_text()) for path in sorted(kept.glob("*.json"))]
    for one in models:
        one["states"] = {when: {int(k): v for k, v in found.items()} for when, found in one["states"].items()}
    body = render(cells, models)
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    text = f"# Reading superpositions back\n\n    python -m benchmarks.unbinding\n\n{about}\n\n{body}\n"
    text += (
        f"![Values found against the number of pairs](unbinding.png)\n\nSeed {chosen.seed}; {READINGS:,} readings a "
    )
    text += f"cell; {headline('cpu', torch.get_num_threads())}.\n"
    (RESULTS / "unbinding.md").write_text(text)
    plot(cells, RESULTS / "unbinding.png")
    print(body)


if __name__ == "__main__":
    main()
