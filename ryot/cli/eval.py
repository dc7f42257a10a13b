"""`ryot-deploy eval`: the quality of a bundle on any text, computed by the bundle's own graph."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ryot.cli.options import HELP, data_option, format_option, verbose_option
from ryot.config import QUALITY_TOKENS


@click.command("eval", context_settings=HELP)
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--reference",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Bundle that KL and top-1 are against, usually the fp32 artifact  [default: none, bits per byte only]",
)
@data_option
@click.option(
    "--tokens",
    metavar="N",
    type=click.IntRange(min=1),
    default=QUALITY_TOKENS,
    show_default=True,
    help="Tokens to score, at least",
)
@format_option("table", "json")
@verbose_option
def command(bundle: Path, reference: Path | None, data: tuple[str, ...], tokens: int, fmt: str) -> None:
    """Score a bundle on text: bits per byte, and KL and top-1 agreement against another bundle.

    Without --data the text is the test part of the standard library's source, which the default run did not train on.

    Example: ryot-deploy eval runs/first/bundle --data README.md
    """
    from tokenizers import Tokenizer

    from ryot.deploy.quality import evaluate_bundle
    from ryot.edge.bundle import TOKENIZER_NAME, load_bundle
    from ryot.models.token_ids import TokenIds
    from ryot.train.corpus import load_corpus
    from ryot.train.dataset import spread_windows
    from ryot.train.tokenizer import byte_lengths, encode_texts

    loaded = load_bundle(bundle)
    context = loaded.model.context_length
    corpus = load_corpus(data)
    texts = [d.text for d in corpus.documents] if data else corpus.texts("test")
    tokenizer = Tokenizer.from_file(str(bundle / TOKENIZER_NAME))
    separator = TokenIds(bos=loaded.bos_token_id, eos=loaded.eos_token_ids, pad=None).separator
    ids = encode_texts(tokenizer, texts, separator)
    windows = spread_windows(ids, -(-tokens // context), context, corpus.name)
    quality = evaluate_bundle(bundle, reference or bundle, windows, byte_lengths(tokenizer, separator))
    values = {
        "schema": 1,
        "bundle": str(bundle),
        "precision": loaded.precision,
        "text": corpus.name,
        "tokens": quality.tokens,
        "loss": quality.loss,
        "bpb": quality.bpb,
    }
    if reference:
        values |= {
            "reference": str(reference),
            "bpb_ratio": quality.bpb_ratio,
            "kl": quality.kl,
            "top1": quality.top1,
        }
    if fmt == "json":
        click.echo(json.dumps(values, indent=1))
        return
    click.echo(f"{loaded.name} {loaded.precision} on {corpus.name}, {quality.tokens} tokens")
    click.echo(f"{'bits per byte':<28}{quality.bpb:.4f}")
    click.echo(f"{'loss':<28}{quality.loss:.4f} nats per token")
    if reference:
        click.echo(f"{'bits per byte of reference':<28}{quality.bpb_ratio:.4f}")
        click.echo(f"{'KL from reference':<28}{quality.kl:.6f} nats per token")
        click.echo(f"{'same best token':<28}{100 * quality.top1:.2f} %")
