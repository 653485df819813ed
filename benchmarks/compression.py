"""Size and accuracy of a trained model as it is served in fewer bits.

    python -m benchmarks.compression CHECKPOINT [--data_path dataset]

Every row is the same trained model, compressed, and evaluated on the test split by the package's own evaluation. Size
is what is stored: tables, weights and scales. States are judged on 256 training histories.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.cells import RESULTS, headline
from recbole_holo.inference import Compression, compress, stored_bytes
from recbole_holo.layers import Mamba
from recbole_holo.quick_start import load_data_and_model
from recbole_holo.training.trainer import get_trainer_class


def rows(model: Any) -> dict[str, Compression | None]:
    d, states = (
        model.item_embedding.embedding_dim,
        max((m.d_state for m in model.modules() if isinstance(m, Mamba)), default=0),
    )
    found: dict[str, Compression | None] = {"as trained, 32 bits": None}
    for bits in (16, 8, 6, 4):
        found[f"tables in {bits} bits"] = Compression(bits, 32)
    for bits in (16, 8, 6, 4):
        found[f"weights in {bits} bits"] = Compression(32, bits)
    both = {"8 bits": (8, 8), "7 and 6 bits": (7, 6), "6 bits": (6, 6)}
    for name, bits in both.items():
        found[f"tables and weights in {name}"] = Compression(*bits)
    if model.binding is not None and model.head is None and not model.scored_products:
        for name, bits in both.items():
            found[f"tables and weights in {name}, bound when read"] = Compression(*bits, fold=False)
    for rank in (d // 2, 3 * d // 4):
        found[f"tables of rank {rank}"] = Compression(32, 32, rank=rank)
    for keep in (states // 2, states // 4) if states else ():
        for criterion in ("energy", "hankel"):
            found[f"{keep} of {states} states, by {criterion}"] = Compression(32, 32, states=keep, criterion=criterion)
    if states:
        for bits in (8, 4):
            found[f"{bits} bits, {states // 2} states"] = Compression(bits, 8, states=states // 2)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("checkpoint")
    options.add_argument("--data_path", default="dataset", help="folder of the data set")
    chosen = options.parse_args()
    config, model, _, train, valid, test = load_data_and_model(
        chosen.checkpoint, data_path=chosen.data_path, state="ERROR", show_progress=False
    )
    histories = train.dataset[torch.randperm(len(train.dataset), generator=torch.Generator().manual_seed(0))[:256]]
    metric, lines, whole = config["valid_metric"].lower(), [], stored_bytes(model)
    base: dict[str, float] = {}
    for name, wanted in tqdm(rows(model).items()):
        small = (
            model
            if wanted is None
            else compress(model, wanted, histories[model.ITEM_SEQ], model.times_of(histories).get("gaps"))
        )
        trainer = get_trainer_class(config)(config, small)
        trainer.eval_collector.data_collect(train)
        scores = {
            split: trainer.evaluate(data, load_best_model=False)[metric]
            for split, data in (("valid", valid), ("test", test))
        }
        base = base or scores
        size = stored_bytes(small)
        lines.append(
            [
                name,
                f"{size / 1024:,.0f}",
                f"{size / whole:.3f}",
                f"{scores['valid']:.4f}",
                f"{scores['test']:.4f}",
                f"{scores['test'] / base['test'] - 1:+.1%}",
            ]
        )
    head = ["", "KiB", "of the whole", f"validation {metric}", f"test {metric}", "change"]
    body = tabulate(lines, headers=head, tablefmt="github", disable_numparse=True)
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    keys = ("model", "dataset", "seed", "item_attributes")
    keys += ("binding", "binding_algebra", "binding_scale", "bind_output", "epochs")
    training = "python run_recbole_holo.py " + " ".join(f'--{key}="{config[key]}"' for key in keys)
    title = f"{config['model']} on {config['dataset']}, compressed"
    text = f"# {title}\n\n    {training}\n    python -m benchmarks.compression CHECKPOINT\n\n{about}\n\n{body}\n\n"
    text += f"{headline('cpu', torch.get_num_threads())}.\n"
    (RESULTS / f"compression-{config['model']}-{config['dataset']}.md").write_text(text)
    print(body)


if __name__ == "__main__":
    main()
